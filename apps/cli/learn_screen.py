"""What a run of `learn` or `bank add` shows of itself: a line a stage, and in a terminal a bar below them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlx_hiermem.apps.cli.display import console, duration, notes

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from mlx_hiermem.learn.train.monitor import TrainingProgress

LINE_SECONDS = 60.0  # between lines about long work where there is no terminal


class Screen:
    """Shows a run (a `learn.stages.Listener`)."""

    def __init__(self, bar: Bar | None, lines: bool) -> None:
        self._bar, self._lines, self._stage, self._said = bar, lines, "", time.monotonic()
        self._since: tuple[float, int] | None = None  # when a stage's work began, and what was done of it already
        self._task = bar.add_task("", total=None, note="") if bar else None

    def begin(self, stage: str) -> None:
        self._stage, self._said, self._since = stage, time.monotonic(), None
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, description=stage, total=None, note="")

    def advance(self, done: int, total: int | None, unit: str) -> None:
        note = f"{done:,} {unit}" if total is None else f"{done:,} of {total:,} {unit}"
        left = self._left(done, total)
        note += f", {duration(left)} left" if left is not None else ""
        self._show(done, total, note)
        self._say_now_and_then(note)

    def _left(self, done: int, total: int | None) -> float | None:
        """Seconds until a stage is done, if it goes on as it has since it began or was taken up again."""
        now = time.monotonic()
        since, before = self._since = self._since or (now, done)
        return (now - since) / (done - before) * (total - done) if total and done > before else None

    def end(self, line: str) -> None:
        if self._lines:
            # Beside the bar where both are seen: it would be drawn over otherwise.
            seen = self._bar.console if self._bar and sys.stdout.isatty() else console
            seen.print(f"{self._stage:<10}{line}", markup=False, highlight=False, soft_wrap=True)

    def training(self, progress: TrainingProgress) -> None:
        if progress.losses:
            losses = ", ".join(f"{name} {loss:.3f}" for name, loss in progress.losses.items())
            self._say(f"loss in subtree {progress.job}: {losses}")
        elif progress.known:
            known, said = progress.known
            self._say(f"subtree {progress.job}: {said:.0%} of its texts said word for word, {known:.0%} known")
        elif progress.doing == "learning":
            left = f", {duration(progress.seconds_left)} left" if progress.seconds_left is not None else ""
            note = f"loss {progress.loss or 0:.3f}, {progress.tokens_per_second:,.0f} tokens/s{left}"
            self._show(progress.tokens, progress.total, note)
            self._say_now_and_then(f"{progress.tokens / progress.total:.0%}, {note}")
        else:
            note = f"{progress.doing} of subtree {progress.job}"
            self._show(progress.tokens, progress.total, note)
            self._say_now_and_then(f"{note}, {progress.tokens / max(1, progress.total):.0%}")

    def _say_now_and_then(self, line: str) -> None:
        """For those who see no bar."""
        if self._bar is None and time.monotonic() - self._said > LINE_SECONDS:
            self._say(line)

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        if self._lines:
            notes.print(f"{self._stage:<10}{line}", style="dim", markup=False, soft_wrap=True)

    def _show(self, done: int, total: int | None, note: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)


@contextmanager
def screen_for(lines: bool) -> Iterator[Screen]:
    """A screen with a bar where somebody sees it. `lines`: whether anything is said at all."""
    if not (lines and sys.stderr.isatty()):
        yield Screen(None, lines)
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description:<9}"), BarColumn(), TextColumn("{task.fields[note]}", style="dim"))
    with Progress(*columns, console=notes, transient=True) as bar:
        yield Screen(bar, lines)
