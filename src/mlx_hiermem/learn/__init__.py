"""Documents become a memory bank for a frozen anchor: corpus, tree, trained blocks (arXiv:2510.02375, §3, App. C).

    from mlx_hiermem.learn import LearnSettings, learn
    learn(["./docs"], pathlib.Path("my-model"), "anchor-folder", LearnSettings())

Every stage reads the files of the stages before it and writes its own into a work folder `OUT.learn/`, each beside
its final name and then renamed. A killed run goes on with the first stage whose files are missing or were made from
something else (`work.Work`). Memory grows with the corpus by some tens of bytes for a window, and for each example
that self-study makes of it; texts and vectors stay on disk.

    stage     code           file              a line, or an array
    corpus    corpus/corpus  files.jsonl       {"file", "name", "sha256"}: what is read
                             windows.jsonl     {"id", "document", "source", "title", "text", …}: line i is window i
                             skipped.jsonl     {"what", "why"}
    study     study/stage    study.jsonl       {"window", "question", "answer", ...}: any number of lines for a
                                               window, in the order of the windows
                             written.jsonl     what a teacher wrote freely, in the forms of prompts
                             studied.json      and how many of its replies and records were not kept
    prompts   study/prompts  prompts.jsonl     the same, and the prompts that the user gives, each in its
                                               window; only where there are any
    probes    tree/probes    probes.jsonl      {"window", "text"}: what somebody may type who wants this
                                               window: its sentences, their beginnings, its generated
                                               questions; then those that ask for its subject ("reversed":
                                               true); last the questions that only measure ("held_out": true)
    vectors   tree/probes    probes.npy        [probes, 384] float32, unit length, row for row of probes.jsonl
                             means.npy         [windows, 384] float32, unit length: the mean of a window's probes
    tree      tree/build     tree.safetensors  the bank's tree (`ClusterTree`), ragged
                             leaves.jsonl      {"window", "leaves": ["0.3", "2.1"]}: line i is window i; the
                                               leaves in which it is learnt, its own first
                             agreement.json    the tree's shape, leaves of a window, and the share of held-out
                                               questions that reach a leaf of their window
    labels    tree/labels    nodes.json        {"0.3": {"label", "documents", "windows", "tokens", "sources"}}
    examples  train/encoding examples/         token sequences, and the leaves that learn them
                             heldout/          token sequences that only measure
    training  train/jobs     training/         a folder for each subtree, log.jsonl, loss.png
    bank      publish        model/            what becomes OUT

`run` goes through all of it; `add` brings new documents into a bank that is there, by `relearn`, which has some of
its blocks learn again. `record` keeps which files a bank has learnt, `stages` how far a run is. `settings` has
everything that can be chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_hiermem.learn.run import AnchorSource, Learnt, learn
    from mlx_hiermem.learn.settings import LearnSettings

__all__ = ["AnchorSource", "LearnSettings", "Learnt", "learn"]


def __getattr__(name: str) -> Any:
    """Loads what is exported when it is used: training needs MLX, and `hiermem --help` does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlx_hiermem.learn import run, settings

    return getattr(settings if name == "LearnSettings" else run, name)
