"""The overflow report: how near each tensor of an exported program comes to what float16 holds.

A tensor that goes beyond 65 504 becomes infinite on the device, and all that is computed from it is lost: a model
then says one token for ever. Peaks are what the interpreter saw before it rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.convert.coreml.compress import HALF_MAX
from mlx_hiermem.errors import CoreMLError

SHOWN = 20  # tensors in a report
NEAR = 0.5  # of the range: from there on a warning


@dataclass(frozen=True)
class Overflow:
    """Peaks max |x| by tensor, in the order of the program."""

    peaks: Mapping[str, float]

    @classmethod
    def of(cls, peaks: Mapping[str, float]) -> Overflow:
        """Of what the interpreter saw.

        Masks are left out, which are large by intention, and whole caches: they hold what was counted before.
        """
        return cls(
            {name: peak for name, peak in peaks.items() if "mask" not in name and not name.endswith("_cache")}
        )

    @property
    def highest(self) -> tuple[str, float]:
        return max(self.peaks.items(), key=lambda item: item[1])

    def check(self) -> None:
        """Raises CoreMLError for the first tensor that float16 cannot hold."""
        for name, peak in self.peaks.items():
            if not peak <= HALF_MAX:
                raise CoreMLError(
                    f"float16 would overflow: {name} reaches {peak:.4g}, the largest is {HALF_MAX:.0f}",
                    "This anchor cannot run on Core ML in half precision.",
                )

    def warnings(self) -> list[str]:
        name, peak = self.highest
        if peak <= NEAR * HALF_MAX:
            return []
        return [f"{name} reaches {peak:.4g} of the {HALF_MAX:.0f} that float16 holds: other texts may overflow"]

    def to_json(self) -> dict[str, Any]:
        """The highest peaks, highest first."""
        highest = sorted(self.peaks.items(), key=lambda item: -item[1])[:SHOWN]
        return {"limit": HALF_MAX, "tensors": len(self.peaks), "peaks": dict(highest)}
