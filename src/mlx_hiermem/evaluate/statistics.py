"""Means with standard errors, and paired differences of two runs over the same examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z = 1.96  # standard errors on either side of a 95 % confidence interval
LARGEST = 700.0  # nats whose exponential is a number; a text without spaces, one long word, has more
Row = Mapping[str, Any]  # an example's line in a file of results
PER = {"perplexity": "tokens", "word_perplexity": "words", "bits_per_byte": "bytes"}  # what a text's loss is per


@dataclass(frozen=True)
class Figure:
    """A metric over n examples; `error` is its standard error, None for fewer than two."""

    value: float
    error: float | None
    n: int

    def to_json(self) -> dict[str, Any]:
        return _finite(asdict(self))


@dataclass(frozen=True)
class Difference:
    """Of a metric, second run minus first, over the examples that both have; `low` to `high` is the 95 % interval.

    `gained` and `lost` count the examples that only the second, or only the first, got right; `p` is the chance of
    so uneven a split or a more uneven one if neither were better (McNemar's exact test).
    """

    value: float
    low: float
    high: float
    n: int
    gained: int | None = None
    lost: int | None = None
    p: float | None = None

    def to_json(self) -> dict[str, Any]:
        return _finite(asdict(self))


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {name: None if value in (math.inf, -math.inf) else value for name, value in data.items()}


def share_interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, part = right / count, Z * Z / count
    middle, half = share + part / 2, Z * math.sqrt(share * (1 - share) / count + part / count / 4)
    return max(0.0, (middle - half) / (1 + part)), min(1.0, (middle + half) / (1 + part))


def figure(rows: Sequence[Row], metric: str) -> Figure:
    """A metric of rows that have it. Wordings of one question are averaged first: they are not independent."""
    if metric not in PER:
        values = _by_question(rows, _column(rows, metric))
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        return Figure(float(_column(rows, metric).mean()), error, len(rows))
    mean, error = _ratio(_column(rows, "nll"), _column(rows, PER[metric]))
    value, slope = _from_loss(metric, mean)
    return Figure(value, error * slope if error is not None and math.isfinite(slope) else None, len(rows))


def difference(first: Sequence[Row], second: Sequence[Row], metric: str) -> Difference:
    """Paired: both have the same examples in the same order. Perplexities differ by a ratio, as a share of the
    first (0.02 is 2 % more); everything else by value."""
    if metric in PER:
        per = _column(first, PER[metric])
        mean, error = _ratio(_column(second, "nll") - _column(first, "nll"), per)
        if metric == "bits_per_byte":
            value, low, high = ((mean + z * (error or 0.0)) / math.log(2) for z in (0, -Z, Z))
        else:
            losses = (mean + z * (error or 0.0) for z in (0, -Z, Z))
            value, low, high = (math.expm1(loss) if loss < LARGEST else math.inf for loss in losses)
        return Difference(value, low, high, len(first))
    change = _column(second, metric) - _column(first, metric)
    mean, by_question = float(change.mean()), _by_question(first, change)
    error = float(by_question.std(ddof=1) / math.sqrt(len(by_question))) if len(by_question) > 1 else 0.0
    counts: tuple[int | None, int | None, float | None] = (None, None, None)
    if set(np.unique(change)) <= {-1.0, 0.0, 1.0}:
        gained, lost = int((change > 0).sum()), int((change < 0).sum())
        counts = (gained, lost, mcnemar(gained, lost))
    return Difference(mean, mean - Z * error, mean + Z * error, len(change), *counts)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided test: of gained + lost tosses of a fair coin, as uneven a split or a more uneven one."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def _by_question(rows: Sequence[Row], values: np.ndarray) -> np.ndarray:
    """The mean of each question's wordings; a row without `question` is one of its own."""
    groups: dict[Any, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(row.get("question", row["id"]), []).append(value)
    return np.array([sum(group) / len(group) for group in groups.values()])


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """Loss per token over documents, and its standard error: documents are what was sampled, not tokens."""
    mean, n = float(sums.sum() / counts.sum()), len(sums)
    if n < 2:
        return mean, None
    spread = ((sums - mean * counts) ** 2).sum() * n / (n - 1)
    return mean, float(math.sqrt(spread) / counts.sum())


def _from_loss(metric: str, loss: float) -> tuple[float, float]:
    """(metric, its slope) at a loss per token, word or byte."""
    if metric == "bits_per_byte":
        return loss / math.log(2), 1 / math.log(2)
    return (math.exp(loss),) * 2 if loss < LARGEST else (math.inf, math.inf)
