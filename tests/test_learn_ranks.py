"""Work in parts: each is made once, by whoever is free, and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from mlx_hiermem.errors import OutputError
from mlx_hiermem.learn import work
from mlx_hiermem.learn.work import BEGUN, FAILED, READY, Ranks, help_make_parts, make_parts
from mlx_hiermem.locks import try_lock

COUNT = 12
HOLD = "from mlx_hiermem.locks import try_lock; import pathlib, sys, time\n"
HOLD += "with try_lock(pathlib.Path(sys.argv[1])) as free: print(free, flush=True); time.sleep(600)\n"


class Parts:
    """Parts that note who made them."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.made = folder, list[tuple[str, int]]()

    def name(self, number: int) -> pathlib.Path:
        return self.folder / f"{number}.txt"

    def make(self, part: int, file: pathlib.Path) -> None:
        time.sleep(0.01)
        self.made.append((threading.current_thread().name, part))
        file.write_text(str(part))


def test_parts_are_made_in_any_order_and_told_once(tmp_path: pathlib.Path) -> None:
    parts, told = Parts(tmp_path), list[int]()
    parts.name(3).write_text("3")
    files = make_parts(parts.name, lambda: range(COUNT), parts.make, told.append)
    assert [file.read_text() for file in files] == [str(number) for number in range(COUNT)]
    assert sorted(told) == list(range(COUNT))
    assert [part for _, part in parts.made] == [number for number in range(COUNT) if number != 3]


def test_helpers_share_them(tmp_path: pathlib.Path) -> None:
    parts = Parts(tmp_path)
    helpers = [
        threading.Thread(
            target=help_make_parts, args=(parts.name, lambda: range(COUNT), parts.make, lambda: True), name=f"{i}"
        )
        for i in range(2)
    ]
    for helper in helpers:
        helper.start()
    make_parts(parts.name, lambda: range(COUNT), parts.make)
    for helper in helpers:
        helper.join()
    assert sorted(part for _, part in parts.made) == list(range(COUNT))  # each once
    assert len({who for who, _ in parts.made}) == 3


def test_help_that_is_not_wanted_any_more_ends(tmp_path: pathlib.Path) -> None:
    parts = Parts(tmp_path)
    help_make_parts(parts.name, lambda: range(COUNT), parts.make, lambda: len(parts.made) < 4)
    assert [part for _, part in parts.made] == [0, 1, 2, 3]


def hold(lock: pathlib.Path) -> subprocess.Popen[str]:
    """Another process that has a lock."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    return holder


def test_what_a_killed_process_had_taken_is_made_here(tmp_path: pathlib.Path) -> None:
    parts = Parts(tmp_path)
    holder = hold(tmp_path / "2.txt.lock")
    helped = Parts(tmp_path)
    help_make_parts(helped.name, lambda: range(COUNT), helped.make, lambda: True)
    assert 2 not in [part for _, part in helped.made]
    threading.Timer(0.3, holder.send_signal, [signal.SIGKILL]).start()
    make_parts(parts.name, lambda: range(COUNT), parts.make)
    assert [part for _, part in parts.made] == [2]
    holder.wait()


def test_a_rank_helps_while_it_is_wanted(tmp_path: pathlib.Path) -> None:
    ranks, parts = Ranks(tmp_path), Parts(tmp_path)
    ranks.count = 2  # of which this test is both
    seen = list[bool]()

    def help_with(wanted: object) -> None:
        seen.append(wanted())  # type: ignore[operator]
        help_make_parts(parts.name, lambda: range(COUNT), parts.make, wanted)  # type: ignore[arg-type]
        seen.append(wanted())  # type: ignore[operator]

    helper = threading.Thread(
        target=ranks.follow, args=({"study": help_with, "other": pytest.fail},), name="helper"
    )
    with ranks.leading():
        helper.start()
        with ranks.sharing("study"):
            files = make_parts(parts.name, lambda: range(COUNT), parts.make)
            while len(seen) < 2:  # or it would look for files that are taken away
                time.sleep(0.01)
        for file in files:
            file.unlink()
    helper.join(10)
    assert not helper.is_alive()
    assert seen == [True, True]
    assert len(parts.made) == COUNT


def test_a_rank_does_not_wait_for_a_first_one_that_was_killed(tmp_path: pathlib.Path) -> None:
    ranks, said = Ranks(tmp_path), list[str]()
    holder = hold(ranks._lock)  # as the first rank does
    ranks._file.write_text(BEGUN)

    def follow() -> None:
        with pytest.raises(OutputError, match=r"the first rank was killed .*start all ranks again") as error:
            ranks.follow({})
        said.append(str(error.value))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    follower.join(2 * work.NAP)
    assert follower.is_alive()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    follower.join(10)
    assert len(said) == 1


@pytest.mark.parametrize("last", [READY, FAILED])
def test_the_first_rank_says_everything_under_its_lock(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    ranks, seen, own = Ranks(tmp_path), list[tuple[str, bool]](), work.write_text
    ranks.count = 2

    def noted(file: pathlib.Path, text: str) -> None:
        with try_lock(ranks._lock) as free:
            seen.append((text, free))
        own(file, text)

    monkeypatch.setattr(work, "write_text", noted)
    with contextlib.suppress(KeyError), ranks.leading():
        if last == FAILED:
            raise KeyError
    assert seen == [(BEGUN, False), (last, False)]
    with try_lock(ranks._lock) as free:
        assert free
