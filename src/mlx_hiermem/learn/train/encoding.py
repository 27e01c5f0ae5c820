"""Windows, and what self-study wrote about them, become examples: token sequences and the leaves that learn them.

A window's own text is learnt as it stands, in the leaves in which it was placed. Of a row of self-study, a prompt
and its answer, the answer alone is learnt: in the leaf that the prompt reaches by itself, because that is where it
will be asked, and every second one in the window's leaves, because the same in other words may reach any of them.
Tokens are made as serving makes them: a prompt by itself, then the answer; a chat in the anchor's own template.
That the answer is over is learnt too: a model that knows `34` but not where it ends goes on to say `347`.

What is held out is learnt nowhere, and lies in the one leaf that serving takes it to: the questions that measure
the routing, and whole windows where the settings ask for them. Where neither is there, some of what is learnt is
measured, which tells how well it has been learnt and not more.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_hiermem.bank.passages import nearest
from mlx_hiermem.config import Path
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.record import WindowVectors
from mlx_hiermem.learn.settings import ExampleSettings
from mlx_hiermem.learn.train.dataset import ALWAYS, FRAMED, IN_CHAT, TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.tree.build import CorpusTree
from mlx_hiermem.learn.tree.probes import KnownProbes, about, is_held_out, is_learnt, with_subjects
from mlx_hiermem.learn.work import Work, with_rows
from mlx_hiermem.router import TextEmbedder
from mlx_hiermem.template_bounds import bounded
from mlx_hiermem.tokenizer import FRAME, encode_chat, encode_text, spells_control

EXAMPLES, HELDOUT = "examples", "heldout"
MEASURED = 64  # windows, about, where nothing is held out
TOGETHER = 256  # drafts whose prompts are embedded together


@dataclass(frozen=True)
class Draft:
    """An example, the leaves of its window, and the text by which serving would route it ("": none)."""

    example: TrainingExample
    leaves: Sequence[Path]
    asked: str
    learnt: bool
    measured: bool


class Encoder:
    """Texts, prompts and answers as an anchor's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def text(self, text: str) -> list[int]:
        """A text that is learnt as it stands, with the special tokens that begin one."""
        return encode_text(self.tokenizer, text)

    def prompt(self, prompt: str, chat: bool) -> list[int]:
        """A prompt as `MemoryModel` has it; a chat where the anchor has no template is a framed question."""
        if chat and self.tokenizer.chat_template is not None:
            return encode_chat(self.tokenizer, _turns(prompt))
        return self.text(FRAME.format(prompt) if chat else prompt)

    def answer(self, prompt: str, answer: str, chat: bool, question: bool = False) -> list[int]:
        """What follows that prompt, with its end: of a chat's turn or a question's answer the anchor's token for
        that, of a statement the full stop."""
        if chat and self.tokenizer.chat_template is not None:
            return self._reply(prompt, answer)
        apart = (chat or not prompt[-1:].isspace()) and not answer[:1].isspace()
        said = f" {answer}" if apart else answer
        if chat or question:
            return self._more(said) + sorted(self.tokenizer.eos_token_ids)[:1]
        return self._more(said if said.endswith((".", "!", "?")) else f"{said}.")

    def _reply(self, prompt: str, answer: str) -> list[int]:
        ends = self.tokenizer.eos_token_ids
        before = self._rendered(_turns(prompt), add_generation_prompt=True)
        whole = self._rendered([*_turns(prompt), {"role": "assistant", "content": answer}])
        if whole.startswith(before) and not spells_control(self.tokenizer, answer):
            tokens = list(self.tokenizer.encode(whole[len(before) :], add_special_tokens=False))
            for end, token in enumerate(tokens, 1):
                if token in ends:
                    return tokens[:end]
        return self._more(answer) + sorted(ends)[:1]

    def _rendered(self, turns: list[dict[str, str]], **options: bool) -> str:
        with bounded():
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))

    def _more(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text, special=False)


def _turns(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def with_context(text: str, prompt: str) -> str:
    """A prompt with a window's text before it: what a distillation's teacher reads."""
    return f"{text}\n\n{prompt}"


def make_examples(
    work: Work,
    built: CorpusTree,
    embedder: TextEmbedder,
    tokenizer: Any,
    settings: ExampleSettings = ExampleSettings(),
    progress: Callable[[int, int], None] | None = None,
    anchor: str = "",
) -> str:
    """Stage `examples`: the sets `EXAMPLES` and `HELDOUT` in the work folder; returns its digest.

    `tokenizer` is that of the anchor whose digest `anchor` is: another's tokens are others. `progress` counts
    windows.
    """

    def make() -> None:
        leaf_of, count = _leaf_of(built, settings.by_passages), built.corpus.count
        known = KnownProbes(work, embedder)
        with (
            TrainingSetWriter(work.path(EXAMPLES)) as learnt,
            TrainingSetWriter(work.path(HELDOUT)) as held,
        ):
            drafts = _drafts(built, Encoder(tokenizer), settings)
            while some := list(itertools.islice(drafts, TOGETHER)):
                for draft, leaf in zip(some, _reached(some, leaf_of, known), strict=True):
                    own = [leaf] if leaf else []
                    if draft.measured:
                        held.add(draft.example, own or draft.leaves[:1])
                    if draft.learnt:
                        leaves = () if own and zlib.crc32(draft.asked.encode()) % 2 else draft.leaves
                        learnt.add(draft.example, draft.leaves if draft.measured else [*leaves, *own])
                if progress:
                    progress(some[-1].example.window + 1, count)

    return work.stage("examples", asdict(settings), [built.digest, anchor], make)


def open_examples(work: Work) -> tuple[TrainingSet, TrainingSet | None]:
    """(what is learnt, what is held out); None where nothing is."""
    held = TrainingSet.open(work.path(HELDOUT))
    return TrainingSet.open(work.path(EXAMPLES)), held if len(held) else None


def _leaf_of(built: CorpusTree, by_passages: bool) -> Callable[[np.ndarray], Path]:
    """Where the bank will take an embedding [dim]."""
    tree, passages = built.tree, WindowVectors(built) if by_passages else None

    def leaf(vector: np.ndarray) -> Path:
        near = nearest(tree, passages, vector) if passages else []
        return near[0][1] if near else tree.route(vector)[0].path

    return leaf


def _reached(
    drafts: Sequence[Draft], leaf_of: Callable[[np.ndarray], Path], embedder: TextEmbedder
) -> list[Path | None]:
    """Where each draft's question goes."""
    asked = [draft.asked for draft in drafts if draft.asked]
    leaves = map(leaf_of, embedder.embed(asked)) if asked else iter(())
    return [next(leaves) if draft.asked else None for draft in drafts]


def _drafts(built: CorpusTree, encoder: Encoder, settings: ExampleSettings) -> Iterator[Draft]:
    # Where nothing is held out, one window in `every` is measured.
    nothing_held_out = not (settings.heldout or built.agreement["questions"])
    every = max(1, built.corpus.count // MEASURED) if nothing_held_out else 0
    subjects = with_subjects(built.corpus.windows())
    studied = with_rows(subjects, built.corpus.studied, lambda pair: pair[0].id)
    for ((window, subject), rows), place in zip(studied, built.placed(), strict=True):
        text, out = about(window.text, subject), window_is_held_out(window, settings.heldout)
        tokens = encoder.text(text)
        if len(tokens) > 1:
            measured = out or bool(every and window.id % every == 0)
            asked = window.text if measured else ""
            yield Draft(_example([], tokens, window), place.leaves, asked, not out, measured)
        for row in () if out else rows:
            yield from _of_row(row, window, place.leaves, encoder, settings.teachers)


def window_is_held_out(window: Window, fraction: float) -> bool:
    """Whether a window is one of the fraction that is not learnt: by its number alone, and spread evenly."""
    return zlib.crc32(f"window {window.id}".encode()) < fraction * 2**32


def _of_row(
    row: dict[str, Any], window: Window, leaves: Sequence[Path], encoder: Encoder, teachers: bool
) -> Iterator[Draft]:
    """The example of one row of self-study, or a given one; none where it has no answer."""
    prompt, answer, chat = row.get("prompt") or row.get("question") or "", row["answer"], bool(row.get("chat"))
    if not prompt:
        tokens = encoder.text(answer)
        if len(tokens) > 1:
            yield Draft(_example([], tokens, window), leaves, "", True, False)
        return
    if not answer.strip():
        return
    always = is_learnt(row)
    ends = always or "question" in row
    asked, said = encoder.prompt(prompt, chat), encoder.answer(prompt, answer, chat, ends)
    teacher = encoder.prompt(with_context(window.text, prompt), chat) if teachers else None
    out = not always and is_held_out(window.id, row.get("question") or prompt)
    form = (IN_CHAT if chat else FRAMED) if row.get("both") else ALWAYS
    yield Draft(_example(asked, said, window, teacher, form), leaves, prompt, not out, out)


def _example(
    prompt: list[int], learnt: list[int], window: Window, teacher: list[int] | None = None, form: int = ALWAYS
) -> TrainingExample:
    tokens = np.array(prompt + learnt, np.int32)
    learn = np.arange(len(tokens)) >= max(len(prompt), 1)
    return TrainingExample(
        tokens, learn, window.id, None if teacher is None else np.array(teacher + learnt, np.int32), form
    )
