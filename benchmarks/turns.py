"""Measures where the turns of a conversation go (mlx_hiermem/router.py).

    python benchmarks/turns.py                    the demo's bank, the elements', ten more trees of these: a minute
    python benchmarks/turns.py --corpora FOLDER   also small banks of other subjects, made here: some minutes

Each turn in tests/conversations.jsonl and tests/changes_of_subject.jsonl says what it is about, or that the bank
knows nothing of it. A turn is right on a path where its subject was learnt, or without memory where there is none
for it. A first turn is not counted: it goes alone. The settings of the rule were chosen on the conversations of
even lines; those of odd lines are reported.

Then each of the first 240 questions of the demo's exam is asked behind another one, by every rule and by the one
that banks without sources have: how many reach the leaf of their document, and how many get no memory.

FOLDER has `corpus/countries.jsonl`, `corpus/vital480.jsonl` and `study/vital480_study.jsonl`, which are not in the
repository. Their trees are made as `hiermem learn` makes them. Writes results/turns.json, and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
from elements import BANK, DOCUMENTS
from elements.wordings import element_wordings
from knowledge import read_exam

from mlx_hiermem.apps.demo.tour import BANK as DEMO
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.policy import OPEN, BankPolicy
from mlx_hiermem.bank.sources import BankSources
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.learn.tree.build import place, reach_of
from mlx_hiermem.learn.tree.kmeans import Separation, Shape, grow
from mlx_hiermem.learn.tree.probes import ProbeVectors, probe_texts
from mlx_hiermem.router import RememberedTexts, Router, TextEmbedder
from mlx_hiermem.sentences import sentences
from mlx_hiermem.tree import ClusterTree, Route

ROOT = pathlib.Path(__file__).parent.parent
TALKS = [ROOT / "tests" / name for name in ("conversations.jsonl", "changes_of_subject.jsonl")]
KINDS = {  # what a turn may be, and what is said of it
    "follow": "follow-ups",
    "change": "to another subject of the bank",
    "foreign": "to a subject that it does not know",
    "further": "follow-ups of that",
    "aside": "thanks, greetings",
}
SEEDS = range(10)
EXAM, BEHIND = DEMO.parent / "vital" / "exam.jsonl.gz", 80  # the exam, and how far away the question before is
SHAPE = Shape(4, 2)
COUNTRIES = 4  # each fourth, and those that are talked about
ASKED = (
    "What is the capital of {}?",
    "Which countries border {}?",
    "What languages are spoken in {}?",
    "When did {} become independent?",
)

Talk = dict[str, Any]
Rule = Callable[[Router, list[str]], list[Route]]


@dataclass(frozen=True)
class Bank:
    """A tree with its reach, and the leaves in which each subject was learnt; the passages where there are any."""

    tree: ClusterTree
    policy: BankPolicy
    homes: dict[str, set[Path]]
    sources: BankSources | None = None
    pieces: Callable[[str], Set[int]] | None = None  # what `Router` has

    def router(self, texts: TextEmbedder) -> Router:
        return Router(self.tree, texts, self.policy, self.sources, self.pieces)


def together(router: Router, texts: list[str]) -> list[Route]:
    """The rule."""
    topic, routes = None, []
    for text in texts:
        turn = router.turn(text, topic)
        topic = turn.topic
        routes.append(turn.route)
    return routes


def always_staying(router: Router, texts: list[str]) -> list[Route]:
    """The same in a bank that has memory for every text: what does not lead elsewhere stays."""
    return together(Router(router.tree, router.embedder, OPEN, router.sources, router.pieces), texts)


def alone(router: Router, texts: list[str]) -> list[Route]:
    return router.route_batch(texts)


RULES: dict[str, Rule] = {"each turn alone": alone, "never without memory": always_staying, "the rule": together}


def shelf(embedder: Embedder) -> Bank:
    """The demo's bank: its sources say in which leaves each document was learnt."""
    bank = MemoryBank.open(DEMO)
    assert bank.sources
    homes: dict[str, set[Path]] = {}
    for leaf in bank.sources.all():
        for window in leaf.windows:
            homes.setdefault(window.title, set()).add(leaf.leaf)
    return Bank(bank.tree, bank.policy, homes, bank.sources, embedder.rare_pieces)


def bundled(texts: TextEmbedder, elements: list[dict[str, Any]]) -> Bank:
    """The elements' bank: its manifest says in which leaf each element was learnt."""
    bank = MemoryBank.open(BANK)
    names = {f"{DOCUMENTS.name}:{line}": element["name"] for line, element in enumerate(elements, 1)}
    homes: dict[str, set[Path]] = {}
    for path, entry in bank.manifest.blocks.items():
        for source in entry.sources if len(path) == bank.config.depth else ():
            homes.setdefault(names[source], set()).add(path)
    for subject, prompts in wordings(elements).items():
        if subject.startswith("number "):
            homes[subject] = {route.path for route in bank.tree.route(texts.embed(prompts))}
    return Bank(bank.tree, bank.policy, homes)


def wordings(elements: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The elements' prompts by what they are about: an element's name, or for questions in reverse `number 51`."""
    found = dict[str, list[str]]()
    for element in elements:
        for wording in element_wordings(element):
            subject = f"number {element['atomic_number']}" if wording.relation == "reverse" else element["name"]
            found.setdefault(subject, []).append(wording.prompt)
    return found


def grown(texts: TextEmbedder, plain: dict[str, list[str]], turned: list[list[str]] | None, seed: int) -> Bank:
    """A tree as `hiermem learn` grows it of these probes by subject; a subject is at home where it is learnt."""
    probes = embedded(texts, list(plain.values()))
    tuning = Separation(probes, embedded(texts, turned) if turned else None)
    tree = grow(np.concatenate(list(probes.means())), SHAPE, seed, tuning).tree
    homes = {subject: set(leaves) for subject, leaves in zip(plain, place(tree, probes), strict=True)}
    return Bank(tree, BankPolicy(reach=reach_of(tree, probes.vectors)), homes)


def embedded(texts: TextEmbedder, groups: list[list[str]]) -> ProbeVectors:
    vectors = texts.embed([text for group in groups for text in group])
    return ProbeVectors.counted(vectors, np.array([len(group) for group in groups]))


def grown_elements(texts: TextEmbedder, elements: list[dict[str, Any]]) -> Iterator[Bank]:
    found = wordings(elements)
    plain = {name: prompts for name, prompts in found.items() if not name.startswith("number ")}
    numbers = {name: prompts for name, prompts in found.items() if name.startswith("number ")}
    for seed in SEEDS:
        bank = grown(texts, plain, list(numbers.values()), seed)
        for name, prompts in numbers.items():
            bank.homes[name] = {route.path for route in bank.tree.route(texts.embed(prompts))}
        yield bank


def others(texts: TextEmbedder, folder: pathlib.Path, talks: list[Talk]) -> dict[str, Bank]:
    """Small banks of other subjects. Probes are each passage, its sentences and beginnings, and questions on it."""
    asked = dict[str, list[str]]()
    for row in rows(folder / "study" / "vital480_study.jsonl"):
        if "question" in row:
            asked.setdefault(row["document"], []).append(row["question"])
    probes: dict[str, dict[str, list[str]]] = {"arts": {}, "nature": {}, "countries": {}}
    topics = {"Arts": "arts", "Biology and health sciences": "nature"}
    for row in rows(folder / "corpus" / "vital480.jsonl"):
        if name := topics.get(row["topic"]):
            probes[name][row["title"]] = probe_texts(row["text"], row["title"], asked[row["title"]])
    wanted = {turn.get("about") for talk in talks for turn in talk["turns"]}
    for number, row in enumerate(rows(folder / "corpus" / "countries.jsonl")):
        if number % COUNTRIES == 0 or row["name"] in wanted:
            text, questions = " ".join(sentences(row["text"])[:12]), [one.format(row["name"]) for one in ASKED]
            probes["countries"][row["name"]] = probe_texts(text, row["name"], questions)
    return {name: grown(texts, plain, None, 0) for name, plain in probes.items()}


def rows(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def play(talk: Talk, bank: Bank, texts: TextEmbedder, rule: Rule) -> Iterator[tuple[str, str, bool]]:
    """(kind, text, whether it went right) of each turn but the first."""
    routes = rule(bank.router(texts), [turn["user"] for turn in talk["turns"]])
    for number, (turn, route) in enumerate(zip(talk["turns"], routes, strict=True)):
        subject = turn.get("about")
        right = route.path in bank.homes[subject] if subject else not route.path
        if number:
            yield turn["kind"], turn["user"], right


def measure(talks: list[Talk], banks: dict[str, Bank], texts: TextEmbedder, rule: Rule) -> dict[str, Any]:
    """Right turns of each kind, and the wrong ones."""
    right, turns, wrong = Counter[str](), Counter[str](), list[str]()
    for talk in talks:
        for kind, text, good in play(talk, banks[talk["bank"]], texts, rule) if talk["bank"] in banks else ():
            turns[kind] += 1
            right[kind] += good
            wrong += [] if good else [f"{talk['bank']}, {kind}: {text}"]
    return {
        **{kind: f"{right[kind]}/{turns[kind]}" for kind in KINDS},
        "right": round(right.total() / max(1, turns.total()), 4),
        "turns": turns.total(),
        "wrong": wrong,
    }


def by_decidedness(router: Router, texts: list[str]) -> list[Route]:
    """The rule of banks without sources, on one that has them: how decided a turn is says where it leads."""
    router._near = lambda policy: None  # type: ignore[method-assign]
    return together(router, texts)


def changes(bank: Bank, texts: TextEmbedder, rule: Rule) -> dict[str, int]:
    """Each question of the exam behind one on another document."""
    asked, found = read_exam(EXAM, "0-240"), Counter[str]()
    for number, row in enumerate(asked):
        before = asked[(number + BEHIND) % len(asked)]["question"]
        route = rule(bank.router(texts), [before, row["question"]])[-1]
        found["right"] += route.path in bank.homes[row["doc"]]
        found["no memory"] += not route.path
    return {"of": len(asked), **found}


def table(named: dict[str, dict[str, Any]]) -> None:
    print(f"\n| | {' | '.join(KINDS.values())} | right |")
    print(f"|---|{'---|' * (len(KINDS) + 1)}")
    for name, found in named.items():
        print(
            f"| {name} | {' | '.join(found[kind] for kind in KINDS)} | {found['right']:.1%} of {found['turns']} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpora", type=pathlib.Path, help="a folder with corpora of other subjects")
    options = parser.parse_args()
    talks = [{"bank": "elements"} | talk for file in TALKS for talk in rows(file)]
    embedder = Embedder.load()
    elements, texts = rows(DOCUMENTS), RememberedTexts(embedder, most=1_000_000)
    banks = {"vital": shelf(embedder), "elements": bundled(texts, elements)}
    if options.corpora:
        banks |= others(texts, options.corpora, talks)
    chosen, reported = ([talk for number, talk in enumerate(talks) if number % 2 == part] for part in (0, 1))
    result: dict[str, Any] = {
        "machine": common.machine(),
        "reach": {name: round(bank.policy.reach, 4) for name, bank in banks.items()},
        "rules": {name: measure(reported, banks, texts, rule) for name, rule in RULES.items()},
        "chosen on": measure(chosen, banks, texts, together),
        "banks": {name: measure(reported, {name: bank}, texts, together) for name, bank in banks.items()},
        "changes": {
            name: changes(banks["vital"], texts, rule)
            for name, rule in {**RULES, "by decidedness": by_decidedness}.items()
        },
        "grown": [measure(reported, {"elements": b}, texts, together) for b in grown_elements(texts, elements)],
    }
    table(result["rules"] | {"the rule, where it was chosen": result["chosen on"]})
    table(result["banks"])
    for name, found in result["changes"].items():
        print(f"{name}: {found}")
    shares = [found["right"] for found in result["grown"]]
    print(f"\nTen other trees of the elements: {np.mean(shares):.1%} right on average, {min(shares):.1%} at worst.")
    file = common.RESULTS / "turns.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
