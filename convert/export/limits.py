"""What a saved anchor must hold before its folder gets its name: no overflow in float16, and its weights' bound.

A tensor that goes beyond 65 504 becomes infinite on the device, and all that is computed from it is lost: a model
then says one token for ever. Peaks are what the interpreter saw before it rounded.

The package itself is run, as an app would run it, on the texts of `sample_texts.py` and with the bank's memories.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.compress import HALF_MAX
from mlx_hiermem.convert.export.distance import Distance, Float32Anchor
from mlx_hiermem.convert.export.exported import Runner
from mlx_hiermem.errors import CoreMLError, VerificationError

# Mean KL from the anchor, in nats. Of SmolLM2: 2.8e-5 for fp16, 6.8e-3 for int8_channel, 7.1e-2 for int4.
BOUNDS = {"fp16": 5e-4, "int8": 5e-4, "int8_channel": 2e-2, "int4": 5e-2, "lut4": 5e-2}
WITH_MEMORY = 2  # texts that are run with each memory, for the peaks
SHOWN = 20  # tensors in a report
NEAR = 0.5  # of the range: from there on a warning

Memories = Mapping[str, Mapping[str, np.ndarray]]


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


@dataclass(frozen=True)
class Measured:
    """What was measured on the package: its distance from the anchor in float32, and the peaks of its tensors."""

    distance: Distance
    overflow: Overflow

    def check(self, bound: float) -> None:
        """Raises CoreMLError where float16 overflows, VerificationError where the bound is exceeded."""
        self.overflow.check()
        if not self.distance.kl <= bound:
            raise VerificationError(
                f"the exported anchor differs from the source by a mean KL of {self.distance.kl:.2g}, "
                f"the bound is {bound:g}",
                "Take more bits (--weights), or accept it with --bound.",
            )


@dataclass(frozen=True)
class SavedAnchor:
    """The anchor as it was saved, and what the manifest says of it and of its memory."""

    package: pathlib.Path
    anchor: Mapping[str, Any]
    memory: Mapping[str, Any] | None


@dataclass(frozen=True)
class Trial:
    """What a saved anchor is run on: every text without memory, and a few with each memory (tensors by path).

    `did` is called after each text.
    """

    reference: Float32Anchor
    memories: Memories
    did: Callable[[], None]

    @property
    def texts(self) -> int:
        """How many are run."""
        return len(self.reference.ids) + WITH_MEMORY * len(self.memories)

    def run(self, runner: Runner) -> Distance:
        """Returns how far the anchor is without memory. Raises CoreMLError where it contradicts its manifest."""
        distance = self.reference.measure(runner, self.did)
        for tensors in self.memories.values():
            runner.set_memory(tensors)
            for ids in self.reference.ids[:WITH_MEMORY]:
                runner.reset()
                runner.feed(ids)
                self.did()
        return distance
