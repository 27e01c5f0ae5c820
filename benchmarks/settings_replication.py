"""Which findings of the paper (arXiv:2510.02375) hold for settings of learning, by what `learn_settings.py` asked.

    python benchmarks/learn_settings.py kinds --anchor MODEL     # and the other plans, in any order
    python benchmarks/knowledge.py MODEL EXAM --rows 240-960 --memory fetched   # for 10a: the bank of `make vital`
    python benchmarks/settings_replication.py --kept "17.4 characters=MODEL.exam.jsonl"   # from kept replies

Settings are compared on the questions that all of them were asked; otherwise as in `replication.py`. A plan of
which a setting is missing gives no row. Writes results/settings_replication.json, and prints the rows of
docs/replication.md.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import common
from knowledge import Row, read_kept
from learn_settings import FOREIGN, VITAL, kept_of
from material import Material, Setting
from plans import PLANS
from replication import Finding, Replies, told, told_shares, verdict

from mlx_hiermem.evaluate.statistics import Difference, difference


@dataclass(frozen=True)
class Claim:
    """That each of `better` answers more than each of `than`, of a plan's settings."""

    number: str
    plan: str
    claim: str
    paper: str
    better: Sequence[str]
    than: Sequence[str]
    asked: str = "exam"  # exam or learnt


LATE, EARLY = ("late", "uniform"), ("early", "middle")
KINDS = "FFN > LoRA-FFN, LoRA-QK, LoRA-VO, KV at equal size"
OTHERS = ("lora-ffn", "lora-qk", "lora-vo", "kv")
HALVES = "questions and retellings 1:1"
LEAF, LEVEL1, BOTH = "64 in the leaf", "64 at level 1", ("32 and 32", "16 and 48")
CLAIMS = [
    Claim("2", "kinds", f"{KINDS}, on unseen wordings", "Fig. 3a, b", ["ffn"], OTHERS),
    Claim("2a", "kinds", "the same for prompts as learnt", "Fig. 3a, b", ["ffn"], OTHERS, "learnt"),
    Claim("3a", "levels", "the leaf alone > level 1 alone, at equal fetch size", "Fig. 3c", [LEAF], [LEVEL1]),
    Claim("3b", "levels", "two levels > one, at equal fetch size", "Fig. 3c", BOTH, [LEAF]),
    Claim("4", "layers", "late and uniform > early and middle", "Table 9", LATE, EARLY),
    Claim("4a", "layers", "late > uniform", "Table 9", ["late"], ["uniform"]),
    Claim(
        "12", "forms", "questions and retellings 1:1 > all forms, of equal size", "ours", [HALVES], ["all forms"]
    ),
    Claim("12a", "forms", "questions and retellings 1:1 > questions alone", "ours", [HALVES], ["questions"]),
    Claim("4b", "time", "uniform > late at about equal time", "ours", ["uniform, twice"], ["late, four times"]),
]
PLAIN = "as it is"
GENTLER = {"11": "amplitude 0.75", "11a": "amplitude 0.5", "11b": "5 % replay", "11c": "4 distractors"}


@dataclass(frozen=True)
class Trend:
    """That answers grow with the logarithm of a number that a plan's settings differ in."""

    number: str
    plan: str
    claim: str
    paper: str
    amounts: Mapping[str, float]


PASSAGES = {"60 passages": 60, "240 passages": 240, "480 passages": 480}
LARGER = {name: count for name, count in PASSAGES.items() if count > 60}
CHARACTERS = {f"{n} characters": n for n in (2, 5, 11.6, 17.4)}  # the last is the bank of `make vital`
UNITS = {f"{n} and {n}": n for n in (8, 32, 128)}
STUDY = {"2": 2, "5": 5, "two writers": 11.6}
TRENDS = [
    Trend("3c", "whole", "a larger bank answers as well as a small one", "larger wins (Fig. 3d)", PASSAGES),
    Trend("3d", "whole", "the same, asked more questions", "larger wins (Fig. 3d)", LARGER),
    Trend("9", "sizes", "the larger the fetched memory, the more is right", "in part, Fig. 4b", UNITS),
    Trend("10", "study", "accuracy grows with the logarithm of study", "ours", STUDY),
    Trend("10a", "whole", "the same, each line learnt twice", "ours", CHARACTERS),
]


Elsewhere = Mapping[str, pathlib.Path]  # the replies of banks made otherwise, as `knowledge.py` keeps them
NOWHERE: Elsewhere = {}


class Asked:
    """What the settings of a plan were asked and answered."""

    def __init__(self, work: pathlib.Path, material: Material, plan: str, kept: Elsewhere = NOWHERE) -> None:
        self.work, self.material, self.settings, self.kept = work, material, PLANS[plan], kept

    def replies(self, asked: str, names: Sequence[str]) -> Replies:
        """Of some settings, by their names, and of the anchor alone (`none`)."""
        kept = {("none", one): row for (_, one), row in read_kept(self.work / "none.jsonl").items()}
        for name in names:
            memory = "blocked" if asked == "blocked" else "fetched"
            own = read_kept(self._file(name))
            kept |= {(name, one): row for (how, one), row in own.items() if how == memory}
        learnt = [self.settings[name] for name in names if name in self.settings]
        rows = {row["id"]: row for setting in learnt for row in self._rows(asked, setting)}
        return Replies(list(rows.values()), kept)

    def _file(self, name: str) -> pathlib.Path:
        """The replies of one bank; a file that is not there has none."""
        if name in self.kept:
            return self.kept[name]
        return kept_of(self.work, self.settings[name]) if name in self.settings else self.work / "not asked"

    def _rows(self, asked: str, setting: Setting) -> list[Row]:
        if asked == "learnt":
            return self.material.learnt(setting)
        if asked == "foreign":
            return [row | {"doc": row["id"]} for row in self.material.foreign("countries", FOREIGN)]
        return self.material.asked(setting)


def compared(claim: Claim, asked: Asked) -> Finding | None:
    """The finding; one with several settings ahead of another is held to be so where all are."""
    names = [name for name in asked.settings if name in (*claim.better, *claim.than)]
    replies = asked.replies(claim.asked, names)
    if not (ids := replies.ids(*names)):
        return None
    gains = {f"{b} − {a}": replies.gain(a, b, ids) for b in claim.better for a in claim.than}
    shares = replies.shares(ids, *names)
    return Finding(
        claim.number,
        claim.claim,
        claim.paper,
        f"{told_shares(shares)}; {'; '.join(told(*gain) for gain in gains.items())}",
        verdict(*gains.values()),
        {"shares": shares, "gains": {name: gain.to_json() for name, gain in gains.items()}},
    )


def gentler(number: str, name: str, asked: Asked) -> Finding | None:
    """Whether a change lessens the harm of a memory that does not belong to a question, and what it costs."""
    names = (PLAIN, name)
    groups = {group: asked.replies(group, names) for group in ("exam", "blocked", "foreign")}
    if not all(replies.has(*names) for replies in groups.values()):
        return None
    shares = {group: one.shares(one.ids(*names), *names) for group, one in groups.items()}
    gains = {group: one.gain(*names, one.ids(*names)) for group, one in groups.items()}
    harmed = Replies(
        [*groups["blocked"].exam.values(), *groups["foreign"].exam.values()],
        groups["foreign"].kept | groups["blocked"].kept,
    )
    harm = harmed.gain(*names, harmed.ids(*names))
    parts = [f"{group}: {told_shares(shares[group])}, {told('', gain).strip()}" for group, gain in gains.items()]
    return Finding(
        number,
        f"{name} lessens harm",
        "ours",
        f"{'; '.join(parts)}; {told('blocked and foreign', harm)}",
        verdict(harm),
        {"shares": shares, "gains": {group: one.to_json() for group, one in gains.items()}, "harm": harm.to_json()},
    )


def grown(trend: Trend, asked: Asked) -> Finding | None:
    """The change of the share of right answers for each doubling, with its interval."""
    replies, names = asked.replies("exam", list(trend.amounts)), list(trend.amounts)
    if not (ids := replies.ids(*names)):
        return None
    slope, shares = doubling(replies, trend.amounts, ids), replies.shares(ids, *names)
    return Finding(
        trend.number,
        trend.claim,
        trend.paper,
        f"{told_shares(shares)}; {told('for each doubling', slope)}",
        verdict(slope),
        {"shares": shares, "doubling": slope.to_json()},
    )


def doubling(replies: Replies, amounts: Mapping[str, float], ids: Sequence[str]) -> Difference:
    """The slope of a straight line over the logarithm to base 2, by least squares: a mean over the questions."""
    at = {name: math.log2(amount) for name, amount in amounts.items()}
    middle = sum(at.values()) / len(at)
    square = sum((x - middle) ** 2 for x in at.values())
    slopes = [0.0] * len(ids)
    for name, x in at.items():
        slopes = [s + (x - middle) * y / square for s, y in zip(slopes, replies.right(name, ids), strict=True)]
    found = difference(replies.rows([0.0] * len(ids), ids), replies.rows(slopes, ids), "accuracy")
    return replace(found, gained=None, lost=None, p=None)


def findings(work: pathlib.Path, material: Material, kept: Elsewhere = NOWHERE) -> Iterator[Finding]:
    """All that the replies are enough for; those of a name in `kept` are read from there."""
    found = [compared(claim, Asked(work, material, claim.plan)) for claim in CLAIMS]
    found += [grown(trend, Asked(work, material, trend.plan, kept)) for trend in TRENDS]
    if material.data:
        harm = Asked(work, material, "harm")
        found += [gentler(number, name, harm) for number, name in GENTLER.items()]
    return (one for one in found if one)


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("--data", type=pathlib.Path, help="for the rows 11: a folder with evals/, qa/, corpus/")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/learn_settings"))
    parser.add_argument("--kept", nargs="+", default=[], metavar="NAME=FILE", help="replies of other banks")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    kept = {name: pathlib.Path(file) for name, _, file in (one.partition("=") for one in asked.kept)}
    found = list(findings(asked.work, Material.read(VITAL, asked.data), kept))
    plain = argparse.Namespace(runs=asked.runs, quick=asked.quick)
    common.save(__file__, {"findings": [asdict(one) for one in found]}, plain, before)
    common.table(
        ("", "finding", "the paper", "ours", ""),
        [(one.number, one.claim, one.paper, one.ours, f"**{one.verdict}**") for one in found],
    )


if __name__ == "__main__":
    main()
