"""How far a run of learning is: told to a listener, and kept in `status.json` for whoever wants to watch it.

    status = read_status(pathlib.Path("my-model"))    # {"state": "running", "stage": "training", ...}

It is written at a calm pace, and never stops a run: what cannot be written is left out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from mlx_hiermem.errors import OutputError
from mlx_hiermem.files import write_json
from mlx_hiermem.learn.work import work_folder

if TYPE_CHECKING:
    from mlx_hiermem.learn.train.monitor import TrainingProgress

STATUS = "status.json"
REPORT = "learning/report.json"  # of a model folder that is done
PACE = 2.0  # seconds between two writings
POINTS = 400  # of the loss that are kept; beyond that every second one goes


class Listener(Protocol):
    """Shows how far a run is."""

    def begin(self, stage: str) -> None:
        """A stage begins, or is found done."""

    def advance(self, done: int, total: int | None, unit: str) -> None:
        """This much of the stage is done; the total is None where it is not known."""

    def end(self, line: str) -> None:
        """The stage is done, and this came out of it."""

    def training(self, progress: TrainingProgress) -> None:
        """How far the training is."""


class Silent:
    """A listener that shows nothing."""

    def begin(self, stage: str) -> None:
        pass

    def advance(self, done: int, total: int | None, unit: str) -> None:
        pass

    def end(self, line: str) -> None:
        pass

    def training(self, progress: TrainingProgress) -> None:
        pass


class Recorder:
    """Passes on what a run tells its listener, and keeps it in `file`."""

    def __init__(self, listener: Listener, file: pathlib.Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._listener, self._file, self._clock, self._written = listener, file, clock, 0.0
        self._since: tuple[float, int] | None = None  # when the stage's work began, and what was done of it then
        self._status: dict[str, Any] = {"pid": os.getpid(), "stages": [], "stage": "", "loss": [], "measured": []}

    def begin(self, stage: str) -> None:
        self._listener.begin(stage)
        self._since = None
        self._keep(stage=stage, done=0, total=None, unit="", doing="", seconds_left=None, at_once=True)

    def advance(self, done: int, total: int | None, unit: str) -> None:
        self._listener.advance(done, total, unit)
        self._keep(done=done, total=total, unit=unit, seconds_left=self._left(done, total))

    def end(self, line: str) -> None:
        self._listener.end(line)
        self._status["stages"].append({"stage": self._status["stage"], "line": line})
        self._keep(at_once=True)

    def training(self, progress: TrainingProgress) -> None:
        self._listener.training(progress)
        if progress.losses:
            losses = {name: round(loss, 4) for name, loss in progress.losses.items() if math.isfinite(loss)}
            row = {"tokens": progress.tokens, "job": progress.job, "losses": losses}
            self._status["measured"] = [*self._status["measured"], row][-POINTS:]
        if progress.doing == "learning" and progress.loss is not None and math.isfinite(progress.loss):
            self._note_loss(progress.tokens, progress.loss)
        if progress.doing in ("learning", "hidden states"):
            self._keep(
                done=progress.tokens,
                total=progress.total,
                unit="tokens",
                doing=f"{progress.doing} of subtree {progress.job}" if progress.doing != "learning" else "",
                seconds_left=progress.seconds_left,
            )

    def _note_loss(self, tokens: int, loss: float) -> None:
        points = self._status["loss"]
        points.append([tokens, round(loss, 4)])
        if len(points) > POINTS:
            self._status["loss"] = points[1::2]

    def _left(self, done: int, total: int | None) -> float | None:
        """Seconds, if the stage goes on as it has."""
        now = self._clock()
        since, before = self._since = self._since or (now, done)
        return (now - since) / (done - before) * (total - done) if total and done > before else None

    def _keep(self, at_once: bool = False, **changed: Any) -> None:
        self._status |= changed
        if not at_once and self._clock() - self._written < PACE:
            return
        with contextlib.suppress(OutputError, OSError):
            write_json(self._file, self._status | {"updated": time.time()}, indent=None)
        self._written = self._clock()


def forget_status(folder: pathlib.Path) -> None:
    """A run has ended well: what is kept of its work folder is no run any more."""
    with contextlib.suppress(OSError):
        (folder / STATUS).unlink(missing_ok=True)


def read_status(model: pathlib.Path, alive: Callable[[int], bool] | None = None) -> dict[str, Any]:
    """How far the learning of a model folder is. `state` is `running`, `stopped`, `done`, or `nothing` where there
    is none. Whether a run's process is there can be told for this machine only."""
    found = _read(work_folder(model) / STATUS)
    if found is not None:
        return found | {"state": "running" if (alive or _alive)(int(found.get("pid", 0))) else "stopped"}
    report = _read(model / REPORT)
    return {"state": "nothing"} if report is None else {"state": "done", "report": report}


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # somebody else's
    return process > 0
