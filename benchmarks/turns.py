"""Measures the rule that gives a turn of a conversation its path (mlx_hiermem/router.py), against other rules.

    python benchmarks/turns.py        the table in results/turns.md; a minute or two on two cores

tests/conversations.jsonl says of each turn which element it is about, or that it is an aside, and so should not
move the conversation. A turn is right on a path where its element was learnt; an aside where it changes nothing.
The first turn of a conversation is not counted: every rule routes it alone. The rules are compared on the demo
bank's tree, and on ten trees that are grown as `hiermem learn` grows them, of the demo's wordings. A rule's setting
is the one that does best on these ten, with the conversation it is tried on left out.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import common
import numpy as np

from mlx_hiermem.apps.demo import tour
from mlx_hiermem.apps.demo.wordings import element_wordings
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.learn.tree.build import place
from mlx_hiermem.learn.tree.kmeans import Separation, Shape, grow
from mlx_hiermem.learn.tree.probes import ProbeVectors
from mlx_hiermem.router import HYSTERESIS, Topic, decidedness, follow
from mlx_hiermem.tree import ClusterTree

ROOT = pathlib.Path(__file__).parent.parent
CONVERSATIONS = ROOT / "tests" / "conversations.jsonl"
ELEMENTS = ROOT / "apps" / "demo" / "elements.jsonl"
RESULTS = pathlib.Path(__file__).parent / "results" / "turns.json"
KINDS = ("follow", "change", "aside")
SEEDS = range(10)
# Words that point back, for the rule that knows some English.
POINTING = {"it", "its", "that", "this", "these", "those", "they", "them", "one", "he", "she", "then", "again"}


Vectors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tree:
    """A tree, and the leaves in which each subject (an element's name, or `number 51`) was learnt."""

    tree: ClusterTree
    homes: dict[str, set[Path]]


@dataclass
class Talk:
    """A conversation so far, as a rule sees it. `vectors` embed any text that a rule may ask for."""

    tree: ClusterTree
    vectors: Vectors
    users: list[str] = field(default_factory=list)
    reply: str = ""
    path: Path | None = None
    topic: Topic | None = None
    mean: np.ndarray | None = None  # of the turns before, decayed

    def joined(self, turns: int) -> np.ndarray:
        return self.vectors[" ".join(self.users[-turns:])]


Rule = Callable[[Talk, float], Path]


def alone(talk: Talk, _: float) -> Path:
    return talk.tree.route(talk.joined(1))[0].path


def joined(talk: Talk, turns: float) -> Path:
    return talk.tree.route(talk.joined(int(turns)))[0].path


def behind_reply(talk: Talk, _: float) -> Path:
    text = f"{talk.reply} {talk.users[-1]}" if talk.reply else talk.users[-1]
    return talk.tree.route(talk.vectors[text])[0].path


def margin(talk: Talk, by: float) -> Path:
    """Stays unless, where the two paths part, the new child is nearer by that much."""
    route = talk.tree.route(talk.joined(1))[0]
    if talk.path is None or route.path == talk.path:
        return route.path
    level = next(i for i in range(len(route.path)) if route.path[i] != talk.path[i])
    distances = talk.tree.distances(talk.joined(1), Path(route.path[:level]))
    return route.path if distances[talk.path[level]] - distances[route.path[level]] > by else talk.path


def decayed(talk: Talk, share: float) -> Path:
    """Routes the turn plus a share of the mean so far."""
    talk.mean = unit(talk.joined(1) + (share * talk.mean if talk.mean is not None else 0))
    return talk.tree.route(talk.mean)[0].path


def short(talk: Talk, words: float) -> Path:
    if talk.path is not None and len(talk.users[-1].split()) < words:
        return talk.path
    return alone(talk, 0)


def pointing(talk: Talk, words: float) -> Path:
    said = {word.strip(".,?!").lower() for word in talk.users[-1].split()}
    return talk.path if talk.path is not None and said & POINTING else short(talk, words)


def decided(talk: Talk, share: float) -> Path:
    return _follow(talk, talk.joined(1), share)


def decided_in_context(talk: Talk, share: float) -> Path:
    """The same with the mean of the turn's embedding and of that of the turn behind the one before it."""
    return _follow(talk, unit(talk.joined(1) + talk.joined(2)), share)


def decided_by_distance(talk: Talk, share: float) -> Path:
    """Decidedness as distances, not as shares of them."""
    return _follow(talk, talk.joined(1), share, gap)


def gap(tree: ClusterTree, vector: np.ndarray, path: Path) -> float:
    nearest = (np.sort(tree.distances(vector, Path(path[:level])))[:2] for level in range(len(path)))
    return sum(float(second - first) for first, second in nearest if np.isfinite(second))


def _follow(
    talk: Talk,
    vector: np.ndarray,
    share: float,
    measured: Callable[[ClusterTree, np.ndarray, Path], float] = decidedness,
) -> Path:
    path = talk.tree.route(vector)[0].path
    talk.topic = follow(talk.topic, path, measured(talk.tree, vector, path), share)
    return talk.topic.path


RULES: dict[str, tuple[Rule, tuple[float, ...]]] = {
    "each turn alone": (alone, (0,)),
    "last turns joined": (joined, (2, 3, 4)),
    "behind the last reply": (behind_reply, (0,)),
    "stay unless nearer by a margin": (margin, tuple(np.arange(0.02, 0.2, 0.02).round(2))),
    "decayed mean": (decayed, (0.3, 0.5, 0.7, 0.9, 1.1)),
    "short turns stay": (short, (3, 4, 5, 6, 8)),
    "short or pointing turns stay": (pointing, (3, 4, 5, 6, 8)),
    "decidedness by distance, turn alone": (decided_by_distance, (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
    "decidedness, turn alone": (decided, (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
    "decidedness, turn in context": (decided_in_context, (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
}
DEFAULT = "decidedness, turn alone"


@dataclass(frozen=True)
class Outcome:
    """One counted turn. `moved`: the path is another than before, and the prompt is prefilled as a whole."""

    kind: str
    text: str
    right: bool
    moved: bool


def play(conversation: dict[str, Any], tree: Tree, vectors: Vectors, rule: Rule, setting: float) -> list[Outcome]:
    """Plays one conversation; an Outcome for each turn but the first."""
    talk, result = Talk(tree.tree, vectors), list[Outcome]()
    for turn in conversation["turns"]:
        talk.users.append(turn["user"])
        before, talk.path = talk.path, rule(talk, setting)
        talk.reply = turn["reply"]
        if before is not None:
            right = talk.path in tree.homes[turn["about"]] if "about" in turn else talk.path == before
            result.append(Outcome(turn["kind"], turn["user"], right, talk.path != before))
    return result


def texts_of(conversations: list[dict[str, Any]]) -> Iterator[str]:
    """Every text that a rule may want embedded."""
    for conversation in conversations:
        turns = conversation["turns"]
        users = [turn["user"] for turn in turns]
        for i, user in enumerate(users):
            yield from (" ".join(users[max(0, i - n) : i + 1]) for n in range(4))
            if i:
                yield f"{turns[i - 1]['reply']} {user}"


def bundled_tree(bank: MemoryBank, names: dict[str, str], prompts: dict[str, np.ndarray]) -> Tree:
    """The demo bank's tree: its manifest says in which leaf each element was learnt."""
    homes: dict[str, set[Path]] = {}
    for path, entry in bank.manifest.blocks.items():
        for source in entry.sources if len(path) == bank.config.depth else ():
            homes.setdefault(names[source], set()).add(path)
    homes |= {subject: {route.path for route in bank.tree.route(rows)} for subject, rows in prompts.items()}
    return Tree(bank.tree, homes)


def grown_tree(seed: int, probes: dict[str, np.ndarray]) -> Tree:
    """A tree as `hiermem learn` grows it for the demo's wordings; an element is at home in its likeliest leaf."""
    named = {name: rows for name, rows in probes.items() if not name.startswith("number ")}
    plain = _by_subject(list(named.values()))
    turned = _by_subject([probes[f"number {number}"] for number, _ in enumerate(named, 1)])
    means = np.concatenate(list(plain.means()))
    tree = grow(means, Shape(4, 2), seed, Separation(plain, turned)).tree
    homes: dict[str, set[Path]] = {name: {*at} for name, at in zip(named, place(tree, plain, 1), strict=True)}
    return Tree(tree, homes | {n: {r.path for r in tree.route(probes[n])} for n in probes.keys() - named.keys()})


def _by_subject(groups: list[np.ndarray]) -> ProbeVectors:
    return ProbeVectors.counted(np.concatenate(groups), np.array([len(group) for group in groups]))


def measure(name: str, conversations: list[dict[str, Any]], trees: list[Tree], vectors: Vectors) -> dict[str, Any]:
    """One rule, on the bank's tree, which is the first, and on the grown ones."""
    rule, settings = RULES[name]
    played = {s: [[play(c, tree, vectors, rule, s) for tree in trees] for c in conversations] for s in settings}
    # max takes the first of equals: settings are listed from little to much hysteresis
    right = {s: np.array([_right(row[1:]) for row in rows]) for s, rows in played.items()}
    chosen = [max(settings, key=lambda s: right[s].sum() - right[s][i]) for i in range(len(conversations))]
    tried = [played[s][i] for i, s in enumerate(chosen)]
    on_bank = [outcome for row in tried for outcome in row[0]]
    return {
        "rule": name,
        "setting": max(set(chosen), key=chosen.count),
        "settings": {str(s): int(right[s].sum()) for s in settings},
        "bank": summary(on_bank),
        "grown": [summary([o for row in tried for o in row[number]])["right"] for number in range(1, len(trees))],
        "wrong": [f"{outcome.kind}: {outcome.text}" for outcome in on_bank if not outcome.right],
    }


def _right(played: list[list[Outcome]]) -> int:
    return sum(outcome.right for one in played for outcome in one)


def summary(tried: list[Outcome]) -> dict[str, Any]:
    kinds = {kind: [outcome.right for outcome in tried if outcome.kind == kind] for kind in KINDS}
    return {
        "turns": len(tried),
        "right": sum(outcome.right for outcome in tried),
        "moves": sum(outcome.moved for outcome in tried),
        **{kind: f"{sum(rows)}/{len(rows)}" for kind, rows in kinds.items()},
    }


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def show(rows: list[dict[str, Any]]) -> None:
    """The table, as Markdown."""
    print("| rule | setting | right | follow-ups | changes | asides | moves | ten other trees, mean (worst) |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        bank, setting = row["bank"], "" if len(row["settings"]) == 1 else f"{row['setting']:g}"
        other = f"{np.mean(row['grown']) / bank['turns']:.1%} ({min(row['grown']) / bank['turns']:.1%})"
        figures = f"{bank['follow']} | {bank['change']} | {bank['aside']} | {bank['moves']}"
        mark = "**" if row["rule"] == DEFAULT else ""
        share = f"{bank['right'] / bank['turns']:.1%}"
        print(f"| {mark}{row['rule']}{mark} | {setting} | {mark}{share}{mark} | {figures} | {other} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bank", type=pathlib.Path, default=tour.BANK, help="the elements bank")
    bank = MemoryBank.open(parser.parse_args().bank)
    conversations = [json.loads(line) for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
    elements = [json.loads(line) for line in ELEMENTS.read_text(encoding="utf-8").splitlines()]
    probes = dict[str, list[str]]()
    for element in elements:
        for wording in element_wordings(element):
            subject = f"number {element['atomic_number']}" if wording.relation == "reverse" else element["name"]
            probes.setdefault(subject, []).append(wording.prompt)
    texts = sorted({*texts_of(conversations), *(text for group in probes.values() for text in group)})
    print(f"embedding {len(texts)} texts", flush=True)
    vectors = dict(zip(texts, Embedder.load().embed(texts), strict=True))
    embedded = {subject: np.stack([vectors[text] for text in group]) for subject, group in probes.items()}
    numbers = {subject: rows for subject, rows in embedded.items() if subject.startswith("number ")}
    names = {f"{ELEMENTS.name}:{line}": element["name"] for line, element in enumerate(elements, 1)}
    trees = [bundled_tree(bank, names, numbers), *(grown_tree(seed, embedded) for seed in SEEDS)]
    rows = [measure(name, conversations, trees, vectors) for name in RULES]
    best = next(row["setting"] for row in rows if row["rule"] == DEFAULT)
    if best != HYSTERESIS:
        print(f"note: the setting in use is {HYSTERESIS}, the best one here {best}")
    result = {"machine": common.machine(), "conversations": len(conversations), "default": DEFAULT, "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(rows)


if __name__ == "__main__":
    main()
