"""Documents become a memory bank for a frozen anchor: corpus, tree, trained blocks (arXiv:2510.02375, §3, App. C).

Every stage reads the files of the stages before it and writes its own into a work folder `OUT.learn/`, each beside
its final name and then renamed. A killed run goes on with the first stage whose files are missing or were made from
something else (`work.Work`). Of what grows with the corpus, no text or vector is held in memory but some tens of
bytes for a window, and for each example that self-study makes of it.

    stage    module        file              a line, or an array
    corpus   corpus,       windows.jsonl     {"id", "document", "source", "title", "text"}: line i is window i
             duplicates,   skipped.jsonl     {"what", "why"}
             windows
    study    study, facts, study.jsonl       {"window", "question", "answer", ...}: any number of lines a window, in
             wordings,                       the order of the windows
             trying, reverse
    prompts  prompts      prompts.jsonl     the same and, in their windows, the prompts that the user gives; only
                                             where there are any
    probes   probes        probes.jsonl      {"window", "text"}: what somebody may type who wants this window: its
                                             sentences, their beginnings, its generated questions; then those
                                             that ask for its subject ("reversed": true), and in the end the
                                             questions that are kept for measuring ("held_out": true)
    vectors  vectors       probes.npy        [probes, 384] float32, unit length, row for row of probes.jsonl
    tree     clustering,   means.npy         [windows, 384] float32, unit length: the middle of a window's probes
             routing       tree.safetensors  the bank's tree (`ClusterTree`), ragged
                           leaves.jsonl      {"window", "leaves": ["0.3", "2.1"]}: line i is window i; where it is
                                             learnt, its own leaf first
                           agreement.json    the tree's shape, leaves a window, and measured: the share of kept
                                             questions that reach a leaf of their window
    labels   labels        nodes.json        {"0.3": {"label", "documents", "windows", "tokens", "sources"}}
    examples making        examples/,        token sequences and the leaves that learn them; what only measures
                           heldout/          (see `examples`)
    train    training      training/         a folder a subtree, log.jsonl, loss.png
    bank     writing       model/            what becomes OUT

`run` goes through all of it; the settings and results of stages are dataclasses too. Python sees the lines as the
dataclasses below. A path is text (`Path.parse`) in files and a `Path` in Python.
"""
