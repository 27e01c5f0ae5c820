"""Which findings of the paper (arXiv:2510.02375) hold for a bank, by what it answers in an exam.

    python benchmarks/knowledge.py MODEL EXAM --rows 240-400 \\
        --memory none generic fetched level1 leaf blocked source fetched+source
    python benchmarks/replication.py MODEL EXAM --rows 240-400     # of the replies that were kept

A finding is held to be so where the 95 % interval of a difference is above 0, not so where it is below, and
unclear else. Both questions about an article count as one sample. Figures are lenient ones: an accepted answer
stands in the reply. Writes results/replication.json, and prints the rows of docs/replication.md.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import common
import numpy as np
from knowledge import Kept, Row, kept_of, read_exam, read_kept

from mlx_hiermem import load
from mlx_hiermem.evaluate.encoding import Prompter
from mlx_hiermem.evaluate.scoring import Pair, Scorer
from mlx_hiermem.evaluate.statistics import Difference, Z, difference, share_interval
from mlx_hiermem.memory.slot import sizes
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel

import mlx.nn as nn  # isort: skip

ROUTER = 6 * (4 * 384**2 + 2 * 384 * 1536)  # weights of the sentence embedder's layers, which read the question
BEFORE_TITLE = "This article is about"
TOGETHER = 4  # articles that are scored before they are kept
FIFTHS = ("rarest", "second", "third", "fourth", "commonest")


@dataclass(frozen=True)
class Finding:
    """A row of the table. `figures` are what `ours` says in words."""

    number: str
    claim: str
    paper: str
    ours: str
    verdict: str  # yes, no or unclear
    figures: dict[str, Any]


class Replies:
    """What was answered to the questions that all of some memories were asked."""

    def __init__(self, exam: Sequence[Row], kept: Kept) -> None:
        self.exam, self.kept = {row["id"]: row for row in exam}, kept

    def has(self, *memories: str) -> bool:
        return bool(self.ids(*memories))

    def ids(self, *memories: str) -> list[str]:
        return [one for one in self.exam if all((memory, one) in self.kept for memory in memories)]

    def wrong_without(self, *memories: str) -> list[str]:
        """The questions that the anchor alone gets wrong."""
        return [one for one in self.ids("none", *memories) if not self.kept["none", one]["lenient"]]

    def right(self, memory: str, ids: Sequence[str]) -> list[float]:
        return [float(self.kept[memory, one]["lenient"]) for one in ids]

    def rows(self, values: Sequence[float], ids: Sequence[str]) -> list[Row]:
        """For `difference`; the questions of one article belong together."""
        return [
            {"id": one, "question": self.exam[one]["doc"], "accuracy": value}
            for one, value in zip(ids, values, strict=True)
        ]

    def gain(self, first: str, second: str, ids: Sequence[str]) -> Difference:
        """Of the second memory over the first."""
        one, other = (self.rows(self.right(memory, ids), ids) for memory in (first, second))
        return difference(one, other, "accuracy")

    def mean(self, memory: str, name: str, ids: Sequence[str]) -> float:
        return fmean(self.kept[memory, one][name] for one in ids)

    def shares(self, ids: Sequence[str], *memories: str) -> dict[str, Any]:
        """Memory -> its share of right answers, with the interval."""
        found = {}
        for memory in memories:
            right = int(sum(self.right(memory, ids)))
            found[memory] = {"right": right, "of": len(ids), "interval": share_interval(right, len(ids))}
        return found


# Verdicts, and how figures are told


def verdict(*differences: Difference) -> str:
    """Whether all are above 0."""
    if all(one.low > 0 for one in differences):
        return "yes"
    return "no" if any(one.high < 0 for one in differences) else "unclear"


def told_shares(shares: Mapping[str, Any]) -> str:
    parts = []
    for memory, one in shares.items():
        low, high = one["interval"]
        parts.append(f"{memory} {one['right'] / one['of']:.0%} ({max(low, 0):.0%}–{high:.0%})")
    count = next(iter(shares.values()))["of"]
    return f"{', '.join(parts)} of {count}"


def told(name: str, one: Difference) -> str:
    return f"{name} {100 * one.value:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"


# The findings


def more_is_fetched(replies: Replies) -> Finding | None:
    memories = [name for name in ("none", "generic", "fetched") if replies.has(name)]  # a bank may have no generic
    if not (ids := replies.ids(*memories)) or "fetched" not in memories:
        return None
    gains = {f"{b} − {a}": replies.gain(a, b, ids) for a, b in pairwise(memories)}
    shares = replies.shares(ids, *memories)
    return Finding(
        "1",
        "fetched > generic > none on specific knowledge",
        "SK 34.1 none, 35.7 generic, 40.3 fetched (A1, A2)",
        f"{told_shares(shares)}; {'; '.join(told(*gain) for gain in gains.items())}",
        verdict(*gains.values()),
        {"shares": shares, "gains": {name: gain.to_json() for name, gain in gains.items()}},
    )


def new_facts(replies: Replies) -> Finding | None:
    if not (ids := replies.wrong_without("generic", "fetched")):
        return None
    gain, shares = replies.gain("generic", "fetched", ids), replies.shares(ids, "generic", "fetched")
    return Finding(
        "1a",
        "the same for facts that `none` gets wrong",
        "no figure",
        f"{told_shares(shares)}; {told('fetched − generic', gain)}",
        verdict(gain),
        {"shares": shares, "gain": gain.to_json()},
    )


def deeper_wins(replies: Replies) -> Finding | None:
    if not (ids := replies.ids("none", "level1", "leaf", "fetched")):
        return None
    gain, both = replies.gain("level1", "leaf", ids), replies.gain("leaf", "fetched", ids)
    shares = replies.shares(ids, "none", "level1", "leaf", "fetched")
    return Finding(
        "3",
        "the deeper level has more at equal fetch size",
        "Fig. 3c",
        f"{told_shares(shares)}; {told('leaf − level1', gain)}; {told('both − leaf', both)}",
        verdict(gain),
        {"shares": shares, "gain": gain.to_json(), "both": both.to_json()},
    )


def blocking_collapses(replies: Replies) -> Finding | None:
    """Whether more than half of what memory adds is lost: blocked is below the middle of none and fetched."""
    if not (ids := replies.ids("none", "fetched", "blocked")):
        return None
    middle = [(a + b) / 2 for a, b in zip(replies.right("none", ids), replies.right("fetched", ids), strict=True)]
    lost = difference(replies.rows(replies.right("blocked", ids), ids), replies.rows(middle, ids), "accuracy")
    fall, left = replies.gain("fetched", "blocked", ids), replies.gain("none", "blocked", ids)
    shares = replies.shares(ids, "none", "fetched", "blocked")
    return Finding(
        "5",
        "blocking the best-matching 1/k of the bank takes most of the gain",
        "70 → 20 % with 1/16 blocked (Fig. 6b)",
        f"{told_shares(shares)}; {told('blocked − fetched', fall)}; {told('blocked − none', left)}",
        verdict(lost),
        {"shares": shares, "middle − blocked": lost.to_json(), "fall": fall.to_json(), "left": left.to_json()},
    )


def rarer_gains_more(replies: Replies, rarity: Mapping[str, float], measure: str) -> Finding | None:
    """By the slope of the gain over the rank of an article's rarity."""
    ids = [one for one in replies.ids("none", "fetched") if replies.exam[one]["doc"] in rarity]
    articles = sorted({replies.exam[one]["doc"] for one in ids}, key=lambda doc: -rarity[doc])
    if len(articles) < len(FIFTHS):
        return None
    rank = {doc: number / (len(articles) - 1) for number, doc in enumerate(articles)}  # 0: the rarest
    fifths: dict[str, Any] = {}
    for number, name in enumerate(FIFTHS):
        own = [one for one in ids if min(4, int(5 * rank[replies.exam[one]["doc"]])) == number]
        fifths[name] = replies.shares(own, "none", "fetched")
        fifths[name]["gain"] = replies.gain("none", "fetched", own).to_json()
    gains: dict[str, list[float]] = {doc: [] for doc in articles}
    for one, none, fetched in zip(ids, replies.right("none", ids), replies.right("fetched", ids), strict=True):
        gains[replies.exam[one]["doc"]].append(fetched - none)
    trend = slope([1 - rank[doc] for doc in articles], [fmean(gains[doc]) for doc in articles])
    ends = ", ".join(f"{100 * fifths[name]['gain']['value']:.0f}" for name in FIFTHS)
    return Finding(
        "6",
        f"the rarer the subject, the larger the gain; rarity by {measure}",
        "atomic numbers, rarest fifth: 17 → 83 % (Fig. 1)",
        f"gain by fifths, rarest first: {ends} points; {told('from commonest to rarest', trend)}",
        verdict(trend),
        {
            "fifths": fifths,
            "gains by": {name: one["gain"] for name, one in fifths.items()},
            "trend": trend.to_json(),
        },
    )


def slope(x: Sequence[float], y: Sequence[float]) -> Difference:
    """Of a straight line through the points, by least squares: the change from x = 0 to x = 1."""
    across, up = np.asarray(x) - fmean(x), np.asarray(y) - fmean(y)
    value = float((across * up).sum() / (across**2).sum())
    residual = up - value * across
    error = math.sqrt(float((residual**2).sum()) / max(1, len(up) - 2) / float((across**2).sum()))
    return Difference(value, value - Z * error, value + Z * error, len(up))


def beats_retrieval(replies: Replies, weights: tuple[int, int]) -> list[Finding]:
    """`weights`: of the anchor's layers, and of a fetched memory."""
    memories = ("none", "fetched", "source", "fetched+source")
    if not (ids := replies.ids(*memories)):
        return []
    shares, costs = replies.shares(ids, *memories), {}
    for memory in memories:
        tokens = replies.mean(memory, "prompt_tokens", ids)
        costs[memory] = {
            "prompt_tokens": tokens,
            "flops": flops(memory, tokens, replies.mean("none", "prompt_tokens", ids), *weights),
            "bytes_moved": replies.mean(memory, "bytes_moved", ids),
            "tokens": replies.mean(memory, "tokens", ids),
        }
    more = {name: costs[name]["flops"] / costs["none"]["flops"] for name in memories[1:]}
    moved = ", ".join(f"{name} {costs[name]['bytes_moved'] / 1e9:.1f}" for name in memories)
    gain = replies.gain("source", "fetched", ids)
    both = [replies.gain(one, "fetched+source", ids) for one in ("fetched", "source")]
    figures = {"shares": shares, "costs": costs, "times the FLOPs of none": more, "gain": gain.to_json()}
    return [
        Finding(
            "7",
            "memory beats retrieval at lower cost",
            "FLOPs × 1.1 for memory; × 1.7 (Wikipedia), × 2.3 (DCLM) for retrieval (Table 3)",
            f"{told_shares(shares)}; {told('fetched − source', gain)}; FLOPs to the first token "
            f"× {more['fetched']:.2f} and × {more['source']:.2f}; GB moved for a reply: {moved}",
            verdict(gain) if more["fetched"] < more["source"] else "no",
            figures,
        ),
        Finding(
            "7a",
            "both together are better than either",
            "“complementary” (§4)",
            f"{told('both − fetched', both[0])}; {told('both − source', both[1])}; "
            f"FLOPs × {more['fetched+source']:.2f}",
            verdict(*both),
            {"gains": [one.to_json() for one in both]},
        ),
    ]


def flops(memory: str, prompt: float, question: float, layers: int, fetched: int) -> float:
    """Until the first token: two for each weight and token. Attention over so short texts, 2 %, is left out, and so
    is the one row that the output projection computes."""
    weights = layers + (fetched if memory.startswith("fetched") else 0)
    return 2 * weights * prompt + (0 if memory == "none" else 2 * ROUTER * question)


# What is computed of the model


def weights_of(model: MemoryModel) -> tuple[int, int]:
    """Weights of the anchor's layers, and of a fetched memory."""
    layers = 0
    for layer in model.anchor.layers:
        for _, module in layer.named_modules():
            if isinstance(module, nn.Linear | nn.QuantizedLinear):
                inputs, outputs = sizes(module)
                layers += inputs * outputs
    return layers, model.bank_for(MemoryChoice.FETCHED).config.fetched_parameters


def rarities(model: MemoryModel, wanted: Sequence[str], kept: pathlib.Path) -> dict[str, dict[str, float]]:
    """Measure -> article -> how rare it is, by what the anchor alone expects, in nats. What the file has is not
    computed again.

    `title` is how unlikely the title is as a subject, which is how seldom the anchor's own texts were about it;
    `passage` is how unlikely a token of its text is, behind the title.
    """
    sources = model.bank_for(MemoryChoice.FETCHED).sources
    assert sources is not None
    texts = {window.title: window.text for one in sources.all() for window in one.windows[::-1]}  # the first window
    known = {row["article"]: row for row in _lines(kept)}
    todo = [title for title in dict.fromkeys(wanted) if title in texts and title not in known]
    model.select("none", "")
    with kept.open("a", encoding="utf-8") as out:
        for some in (todo[at : at + TOGETHER] for at in range(0, len(todo), TOGETHER)):
            titles = expected(model, [(BEFORE_TITLE, title) for title in some])
            passages = expected(model, [(f"{title}.", texts[title]) for title in some])
            for title, (nll, _), (sum_of_text, tokens) in zip(some, titles, passages, strict=True):
                known[title] = {"article": title, "title": nll, "passage": sum_of_text / tokens}
                out.write(json.dumps(known[title], ensure_ascii=False) + "\n")
            out.flush()
    found = [title for title in dict.fromkeys(wanted) if title in known]
    return {measure: {title: known[title][measure] for title in found} for measure in ("title", "passage")}


def expected(model: MemoryModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
    """How unlikely each continuation of a text is: its nats, and its tokens."""
    prompter = Prompter(model)
    tokens: list[list[Pair]] = [[(prompter.plain(text), prompter.continuation(more))] for text, more in pairs]
    scores = dict(scored for batch in Scorer(model).score(tokens) for scored in batch)
    return [(scores[number][0].nll, scores[number][0].tokens) for number in range(len(pairs))]


def _lines(file: pathlib.Path) -> list[Row]:
    """Whole lines of JSON; none where there is no file."""
    return [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]] if file.is_file() else []


def findings(replies: Replies, model: MemoryModel, rarity: pathlib.Path) -> list[Finding]:
    """All that the replies are enough for."""
    found = [make(replies) for make in (more_is_fetched, new_facts, deeper_wins, blocking_collapses)]
    if replies.has("none", "fetched"):
        asked = [replies.exam[one]["doc"] for one in replies.ids("none", "fetched")]
        for measure, of in rarities(model, asked, rarity).items():
            found.append(rarer_gains_more(replies, of, f"the anchor's loss on the {measure}"))
    return [one for one in [*found, *beats_retrieval(replies, weights_of(model))] if one]


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("exam", type=pathlib.Path)
    parser.add_argument("--rows", default="240-960", help="first-end of the exam; those not asked are left out")
    parser.add_argument("--kept", type=pathlib.Path, help="where knowledge.py has kept the replies")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    replies = Replies(read_exam(asked.exam, asked.rows), read_kept(asked.kept or kept_of(asked.model)))
    found = findings(replies, load(asked.model), asked.model.with_name(f"{asked.model.name}.rarity.jsonl"))
    result = {"exam": asked.exam.name, "rows": asked.rows, "findings": [asdict(one) for one in found]}
    common.save(__file__, result, asked, before)
    common.table(
        ("", "finding", "the paper", "ours", ""),
        [(one.number, one.claim, one.paper, one.ours, f"**{one.verdict}**") for one in found],
    )


if __name__ == "__main__":
    main()
