"""What a saved anchor must hold before its folder gets its name: no overflow in float16, and its weights' bound.

The package itself is run, as an app would run it, on the texts of `prompts.py` and with the bank's memories.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.measure import Distance, Reference
from mlx_hiermem.convert.coreml.overflow import Overflow
from mlx_hiermem.convert.coreml.runner import Runner
from mlx_hiermem.errors import VerificationError

# Mean KL from the anchor, in nats. Of SmolLM2: 2.8e-5 for fp16, 6.8e-3 for int8_channel, 7.1e-2 for int4.
BOUNDS = {"fp16": 5e-4, "int8": 5e-4, "int8_channel": 2e-2, "int4": 5e-2, "lut4": 5e-2}
WITH_MEMORY = 2  # texts that are run with each memory, for the peaks

Memories = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Gate:
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


def measure_package(
    package: pathlib.Path,
    anchor: Mapping[str, Any],
    memory: Mapping[str, Any] | None,
    reference: Reference,
    memories: Memories,
    did: Callable[[], None],
) -> Gate:
    """Runs the package on every text without memory, and on a few with each of `memories` (tensors by path).

    `anchor` and `memory` are the manifest's; `did` is called after each text. Raises CoreMLError where the
    package contradicts its own declarations.
    """
    peaks: dict[str, float] = {}
    runner = Runner(Program.load(package), anchor, memory, peaks)
    distance = reference.measure(runner, did)
    for tensors in memories.values():
        runner.set_memory(tensors)
        for ids in reference.ids[:WITH_MEMORY]:
            runner.reset()
            runner.feed(ids)
            did()
    return Gate(distance, Overflow.of(peaks))
