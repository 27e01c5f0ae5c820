"""The commands that `kills.py` ends: what each starts from, and what it makes or changes."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import books

REPO = "me/tiny"


@dataclass(frozen=True)
class Command:
    """`words` run in a work folder; they change the folder `changes`, or make `makes`."""

    name: str
    words: tuple[str, ...]
    start: Callable[[pathlib.Path], object]
    changes: str = ""
    makes: str = ""
    bank: str = ""  # the folder of the bank that there is afterwards
    staged: bool = False  # killed in each of its stages in turn
    once: bool = False  # done, it cannot be done again, or is done once more
    left: str = ""  # what a kill may leave once the command is done, as the names begin


def run(work: pathlib.Path, words: list[str]) -> None:
    """Runs a command in this process, whose working folder changes."""
    from mlx_hiermem.apps.cli.main import main as hiermem

    os.chdir(work)
    sys.argv = ["hiermem", *words]
    hiermem()


def start_of_learn(work: pathlib.Path) -> None:
    from tiny import make_anchor

    make_anchor(work / "tiny" / "anchor")
    books.write_library(work / "books", 8)
    (work / "learn.toml").write_text("[tree]\nleaves = 1\n\n[training]\nepochs = 4\nrate = 0.02\n")


def start_of_add(work: pathlib.Path) -> None:
    start_of_learn(work)
    with contextlib.suppress(SystemExit):
        run(work, [*LEARN, "--no-self-study"])
    books.write_library(work / "news", 2, 8)


def start_of_remove(work: pathlib.Path) -> None:
    from mlx_hiermem.bank.bank import MemoryBank

    start_of_add(work)
    tree = MemoryBank.open(work / "model/bank").tree
    leaf = min(tree.nodes(tree.depth))
    (work / "leaf").write_text(str(leaf))


def start_of_merge(work: pathlib.Path) -> None:
    from tiny import CONFIG, make_bank, make_model

    make_model(work / "model", absent=("2.0",))
    make_bank(work / "other", work / "model/anchor", CONFIG, absent=("2.0",))


def start_of_convert(work: pathlib.Path) -> None:
    from sources import make_hf, make_memory

    from mlx_hiermem.config import MemoryConfig

    make_hf(work / "source")
    widths = {"hidden": 64, "ffn_width": 128, "q_width": 64, "kv_width": 32}  # those of `sources.BASE`
    make_memory(work / "memories.safetensors", MemoryConfig("ffn", 3, (4, 2), (0, 2), dtype="float32", **widths))


def start_of_eval(work: pathlib.Path) -> None:
    from tiny import make_model

    make_model(work / "model")
    rows = [{"prompt": f"What does {books.fact(n)[0]} make?", "answer": books.fact(n)[1]} for n in range(10)]
    (work / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def start_of_pull(work: pathlib.Path) -> None:
    (work / "nothing").write_text("")


def make_shared(model: pathlib.Path) -> None:
    from tiny import make_model

    make_model(model)


LEARN = ("learn", "books", "model", "--anchor", "tiny", "--config", "learn.toml")
EVAL = (
    "eval",
    "model",
    "--tasks",
    "questions.jsonl",
    "--memory",
    "none",
    "--memory",
    "fetched",
    "--out",
    "results",
)
EXPORT = ("export", "coreml", "model", "out", "--context", "32", "--weights", "fp16")
COMMANDS = (
    Command(
        "convert",
        ("convert", "source", "out", "--memories", "memories.safetensors", "--resume"),
        start_of_convert,
        makes="out",
        bank="out/bank",
    ),
    Command("learn", LEARN, start_of_learn, makes="model", bank="model/bank", staged=True, left="model.learn"),
    Command(
        "add",
        ("bank", "add", "model", "news", "--epochs", "4", "--rate", "0.02", "--no-self-study"),
        start_of_add,
        changes="model/bank",
        bank="model/bank",
        staged=True,
        once=True,
        left="model.learn.gone/",
    ),
    Command(
        "remove",
        ("bank", "remove", "model", "{leaf}"),
        start_of_remove,
        changes="model/bank",
        bank="model/bank",
        once=True,
    ),
    Command(
        "quantize",
        ("bank", "quantize", "model", "out", "--bits", "8,4", "--resume"),
        start_of_merge,
        makes="out",
        bank="out/bank",
    ),
    Command(
        "merge",
        ("bank", "merge", "model", "other", "out", "--prefer", "second", "--resume"),
        start_of_merge,
        makes="out",
        bank="out",
    ),
    Command("push", ("bank", "push", "model", REPO), start_of_merge, bank="model/bank"),
    Command("pull", ("bank", "pull", REPO, "out"), start_of_pull, makes="out", bank="out/bank"),
    Command("export", EXPORT, start_of_merge, makes="out", bank="model/bank"),
    Command("eval", EVAL, start_of_eval, bank="model/bank"),
)
