"""Everything that can be chosen about learning, and the same as a TOML file.

    settings = LearnSettings(tree=TreeSettings(depth=3), training=TrainingSettings(epochs=8))
    write_settings(pathlib.Path("learn.toml"), settings)
    settings = read_settings(pathlib.Path("learn.toml"))

A TOML file may leave out what it does not change. Questions and prompts are not in it: they are files of their own.
"""

from __future__ import annotations

import inspect
import json
import pathlib
import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar

from mlx_hiermem.errors import HierMemError, SettingsError
from mlx_hiermem.files import parse_toml, read_text, write_text

OBJECTIVES = ("next-token", "distillation")
ENOUGH_TOKENS = 100_000  # learnt by a subtree over all epochs, where the epochs are not set
FEWEST_EPOCHS, MOST_EPOCHS = 4, 16  # of those
T = TypeVar("T")


@dataclass(frozen=True)
class PromptPair:
    """A prompt that the user gives, and what is to follow it.

    `document` is a title or a source. A `chat` is learnt in the anchor's chat template; a `framed` prompt is put as
    a question. One without a prompt is a text to learn as it stands.
    """

    document: str
    prompt: str
    answer: str
    chat: bool = False
    framed: bool = False


@dataclass(frozen=True)
class CorpusSettings:
    """How documents are read and cut into windows."""

    field: str = "text"  # of a .jsonl line or a data set's row: what is learnt
    title: str = ""  # the field that holds its title; "": title, name, heading or subject
    tokens: int = 192  # of a window, at most, as the sentence embedder counts them: it reads 256, title included
    any_language: bool = False  # learn a corpus in a language that the embedder does not know, too

    def __post_init__(self) -> None:
        _check_least(self, 1, "tokens")


@dataclass(frozen=True)
class StudySettings:
    """How much self-study writes, and how it is tried before it is kept."""

    amount: float = 10.0  # tokens of study for each token of a document, where the teacher writes freely
    measured: bool = True  # keep one in ten of its questions out of what is learnt, to measure the routing by
    at_once: int = 8  # requests that a teacher's server is sent at a time
    timeout: float = 600.0  # seconds until a teacher's server must have answered
    questions: int = 5  # wordings in which a fact is asked for, at most
    statements: int = 2  # beginnings of statements that a fact completes, at most
    chats: int = 1  # questions of a fact that are learnt as a chat too; others in each window
    invented: int = 2  # windows for which a wording is invented, of all that say the same of different subjects
    tried: int = 6  # windows on which a wording is tried
    first_tried: int = 2  # windows that it is tried on first: where it fails on these, it is dropped
    right: float = 0.5  # share of the tries that must find the answer
    reversed_questions: int = 3  # wordings that ask from a value back to what has it, at most
    reversed_statements: int = 1  # beginnings of statements of that kind, at most
    seed: int = 0  # of what is drawn at random

    def __post_init__(self) -> None:
        if wrong := [name for name in ("amount", "at_once", "timeout") if getattr(self, name) <= 0]:
            raise HierMemError(f"{wrong[0]} must be more than 0")
        _check_least(self, 1, "invented", "tried")
        _check_least(self, 0, "questions", "statements", "chats", "first_tried")
        _check_least(self, 0, "reversed_questions", "reversed_statements")
        if not 0 < self.right <= 1:
            raise HierMemError(
                f"right must be more than 0, and 1 at most, not {self.right}", "It is a share, such as 0.5."
            )


@dataclass(frozen=True)
class TreeSettings:
    """The tree's shape, and where windows are learnt in it."""

    branching: int = 0  # children of a node; 0: chosen by the corpus' size
    depth: int = 0  # levels; 0: chosen by the corpus' size
    leaves: int = 1  # in which one window is learnt, at most; 2 suit a bank without sources
    balance: float = 1.0  # windows of a child, at most, as a multiple of its even share; blocks are of one size too
    seed: int = 0  # of k-means

    def __post_init__(self) -> None:
        _check_least(self, 0, "branching", "depth")
        _check_least(self, 1, "leaves", "balance")


@dataclass(frozen=True)
class MemorySettings:
    """The memory's design."""

    kind: str = "ffn"  # or lora-qk, lora-vo, lora-ffn, kv
    sizes: tuple[int, ...] = ()  # units of a block in a layer, by level; empty: 330 in all layers together
    placement: str | tuple[int, ...] = "uniform"  # all layers; or early, middle, late (a third), or indices
    dtype: str = "float16"  # of the blocks on disk


@dataclass(frozen=True)
class ExampleSettings:
    """What examples are made for the training."""

    heldout: float = 0.0  # share of the windows that are not learnt but only measured
    teachers: bool = False  # keep the prompts with context that distillation needs
    by_passages: bool = False  # learn prompts where passages take them, as a bank with sources does


@dataclass(frozen=True)
class TrainingSettings:
    """How blocks are trained. An interrupted run goes on only with the same settings, but for `states_bytes`.

    A step is `groups` groups of texts. A group is of one leaf, so its texts share one memory. The optimiser is the
    paper's (arXiv:2510.02375, App. A.2) at a higher rate: a leaf sees thousands of tokens here, and millions there.
    """

    epochs: int = 0  # how often each text is learnt; 0: chosen by the corpus' size
    groups: int = 1  # in a step; small steps learn faster: with 4, elements needed half as many epochs more
    group_tokens: int = 256  # of a group, about
    rest: bool = True  # let texts that are known rest for an epoch, or more if they stay known
    rate: float = 1.2e-2  # learning rate at its highest
    final_rate: float = 0.05  # where it ends, as a share of `rate`
    warm_up: float = 0.04  # share of a subtree's training in which it rises
    weight_decay: float = 1e-3  # of the blocks
    clip: float = 1.0  # norm of the gradient, at most
    objective: str = "next-token"  # or distillation, for the examples that have a teacher
    generic: bool = True  # train the control block too, in 1 of k + 1 groups on a path of k blocks
    seed: int = 0  # of everything that is drawn at random
    blocks_bytes: int = 2 << 30  # of memory, for blocks and their optimiser states; the others wait on disk
    states_bytes: int = 20 << 30  # of disk, for the hidden states of the subtree in training

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise HierMemError(f"objective '{self.objective}' is not known", f"Use {' or '.join(OBJECTIVES)}.")
        positive = ("groups", "group_tokens", "rate", "clip", "blocks_bytes")
        if wrong := [name for name in positive if getattr(self, name) <= 0]:
            raise HierMemError(f"{wrong[0]} must be more than 0")
        if self.epochs < 0:
            raise HierMemError("epochs must be 0 or more")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def epochs_for(tokens: int) -> int:
    """How often a subtree with this many tokens is learnt, so that it learns about `ENOUGH_TOKENS`."""
    return min(max(round(ENOUGH_TOKENS / max(tokens, 1)), FEWEST_EPOCHS), MOST_EPOCHS)


@dataclass(frozen=True)
class LearnSettings:
    """All of `hiermem learn`."""

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    tree: TreeSettings = field(default_factory=TreeSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    self_study: bool = True  # have questions and answers written about the documents
    teacher: str = ""  # the model that writes them: a folder or hub id that mlx-lm loads; "": the anchor
    teacher_url: str = ""  # or a server that speaks OpenAI's protocol: http://127.0.0.1:1234/v1
    teacher_model: str = ""  # what the model is called there; "": the first one that the server names
    study: StudySettings = field(default_factory=StudySettings)
    heldout: float = 0.0  # share of the windows that are not learnt but only measured
    training: TrainingSettings = field(default_factory=TrainingSettings)
    questions: tuple[tuple[str, str], ...] = ()  # (question, document that answers it), to measure the routing by
    prompts: tuple[PromptPair, ...] = ()  # learnt beside self-study's
    licence: str = ""  # of the documents, for the bank's manifest
    sources: bool = True  # keep the windows in the bank, so that an answer can show where it comes from
    keep: bool = False  # keep the work folder

    def __post_init__(self) -> None:
        _check_teacher(self.teacher, self.teacher_url)
        if not 0 <= self.heldout < 1:
            raise HierMemError(
                f"heldout must be 0 or more, and less than 1, not {self.heldout}",
                "It is a share: 0.05 is one window in twenty.",
            )

    def to_json(self) -> dict[str, Any]:
        """What a bank's manifest says of them."""
        data = asdict(self)
        teacher = self.teacher or self.teacher_model or ("a server's" if self.teacher_url else "")  # no addresses
        data["teacher"] = teacher if self.self_study else None
        return {name: data[name] for name in ("corpus", "teacher", "study", "tree", "heldout")}


@dataclass(frozen=True)
class AddSettings:
    """All of adding documents to a bank."""

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    leaves: int = 1  # in which one window is learnt, at most
    new_leaf: bool = False  # give the documents a leaf of their own, where the tree has room for one near them
    self_study: bool = True  # as for `LearnSettings`
    teacher: str = ""
    teacher_url: str = ""
    teacher_model: str = ""
    study: StudySettings = field(default_factory=StudySettings)
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(epochs=4, rate=6e-3))
    prompts: tuple[PromptPair, ...] = ()
    keep: bool = False

    def __post_init__(self) -> None:
        _check_teacher(self.teacher, self.teacher_url)
        _check_least(self, 1, "leaves")


@dataclass(frozen=True)
class SyncSettings:
    """How what has changed in a folder is learnt and forgotten."""

    learning: AddSettings = field(default_factory=AddSettings)
    above: bool = False  # the blocks above a leaf forget too: they and all leaves below begin afresh
    probes: int = 6  # questions about each file that is gone or changed


def _check_least(settings: Any, least: int, *names: str) -> None:
    """Raises HierMemError for the first of these settings that is less than that."""
    for name in names:
        if not (value := getattr(settings, name)) >= least:  # so that it is raised for no number (nan) too
            raise HierMemError(f"{name} must be {least} or more, not {value}")


def _check_teacher(model: str, url: str) -> None:
    """Raises HierMemError where a teacher is named twice, or its server's address is none."""
    if model and url:
        raise HierMemError("a teacher is a model or a server, not both", "Leave out teacher or teacher_url.")
    if url and not re.match(r"https?://[^/]", url):
        raise HierMemError(f"teacher_url '{url}' is no address", "Write it like http://127.0.0.1:1234/v1.")


# A TOML file


NOT_IN_FILE = ("questions", "prompts")  # read from files of their own
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list of numbers"}


def read_settings(*files: pathlib.Path) -> LearnSettings:
    """The settings in TOML files; what two of them set is as the later one says.

    Raises SettingsError, which names the file and the key that is wrong.
    """
    settings, merged = LearnSettings(), dict[str, Any]()
    for file in files:
        for name, value in _table(file).items():
            merged[name] = merged.get(name, {}) | value if isinstance(value, dict) else value
        try:
            settings = settings_from_dict(merged)
        except HierMemError as error:
            raise SettingsError(f"{file}: {error.what}", error.hint) from error
    return settings


def _table(file: pathlib.Path) -> dict[str, Any]:
    text = read_text(file, SettingsError)
    try:
        return parse_toml(text)
    except ValueError as error:
        raise SettingsError(f"{file} is not TOML: {error}") from error


def write_settings(file: pathlib.Path, settings: LearnSettings) -> None:
    """Writes all settings, each with what it means, as a TOML file for `read_settings`. Raises OutputError."""
    groups = {one.name: getattr(settings, one.name) for one in fields(settings)}
    groups = {name: value for name, value in groups.items() if is_dataclass(value)}
    data, said = settings_to_dict(settings), _comments(LearnSettings)
    lines = [
        "# Settings of `hiermem learn`. What is left out has its default; options on the command line override it.",
        "",
    ]
    lines += [_line(name, value, said) for name, value in data.items() if name not in groups]
    for name, group in groups.items():
        said = _comments(type(group))
        lines += ["", f"# {(inspect.getdoc(group) or name).splitlines()[0]}", f"[{name}]"]
        lines += [_line(key, value, said) for key, value in data[name].items()]
    write_text(file, "\n".join(lines) + "\n")


def settings_to_dict(settings: LearnSettings) -> dict[str, Any]:
    """Settings as plain values: a table for each group."""
    return {name: value for name, value in asdict(settings).items() if name not in NOT_IN_FILE}


def settings_from_dict(data: Mapping[str, Any]) -> LearnSettings:
    """Settings from plain values; what is not there has its default. Raises SettingsError for what is wrong."""
    return _parsed(LearnSettings, data, "")


def _line(key: str, value: Any, comments: Mapping[str, str]) -> str:
    """A key and its value, which TOML writes as JSON does, and its comment."""
    return f"{key} = {json.dumps(value, ensure_ascii=False)}  # {comments[key]}"


def _comments(kind: type) -> dict[str, str]:
    """What each setting means: the comment behind it in the class above, so that it is written once."""
    return dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(kind), re.MULTILINE))


def _parsed(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """A settings class from its table; `where` is the table's name and a dot."""
    known = [one.name for one in fields(typing.cast(Any, kind)) if where or one.name not in NOT_IN_FILE]
    if unknown := sorted(data.keys() - set(known)):
        raise SettingsError(f"there is no setting {where}{unknown[0]}", f"Known are {', '.join(known)}.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{where}{name}") for name, value in data.items()})


def _value(wanted: Any, value: Any, name: str) -> Any:
    """A setting of the type that its class names. A list is a tuple, and a whole number may be a float."""
    if is_dataclass(wanted):
        if not isinstance(value, Mapping):
            raise SettingsError(f"{name} is a group of settings", f"Write [{name}], and its settings below.")
        return _parsed(typing.cast(Any, wanted), value, f"{name}.")
    choices = typing.get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    kinds = [typing.get_origin(choice) or choice for choice in choices]
    if tuple in kinds and isinstance(value, list | tuple) and all(type(one) is int for one in value):
        return tuple(value)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in (kind for kind in kinds if kind is not tuple):
        raise SettingsError(f"{name} is {value!r}", f"It must be {' or '.join(NAMES[kind] for kind in kinds)}.")
    return value
