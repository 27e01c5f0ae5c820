"""A disk that fails on request: disk.c, put before the C library of a campaign's processes."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

FAULTS = ("full", "read-only", "eio", "short", "slow")


def fails() -> bool:
    """Whether this process's disk can be made to fail."""
    return "torture" in os.environ.get("LD_PRELOAD", "")


def can_fail() -> bool:
    """Whether there is a compiler for disk.c, and a system that takes it."""
    return sys.platform.startswith("linux") and bool(shutil.which("cc"))


def library() -> pathlib.Path:
    """disk.c, compiled."""
    made = pathlib.Path(tempfile.mkdtemp(prefix="torture-")) / "disk.so"
    source = pathlib.Path(__file__).with_name("disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", made, source, "-ldl"], check=True)
    return made


def slowly(folder: pathlib.Path, seconds: float) -> dict[str, str]:
    """The environment of a process for which each read, write and change below a folder takes so much longer."""
    return {"LD_PRELOAD": str(library()), "TORTURE_SLOW": f"{round(seconds * 1e6)} {folder.resolve()}"}


def with_a_disk_that_fails() -> None:
    """Starts this program again with disk.c before the C library, where that can be."""
    if not fails() and can_fail():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": str(library())})


def fail(folder: pathlib.Path, how: str, after: int) -> None:
    """Has the disk fail for this process: it takes no more than `after` bytes; or after so many changes or reads
    below a folder it takes no change, gives nothing, or gives less than was asked for; or each takes so many
    microseconds more."""
    disk, count, place = ctypes.CDLL(None), ctypes.c_long(after), os.fsencode(folder.resolve())
    match how:
        case "full":
            disk.torture_full(count)
        case "read-only":
            disk.torture_locked(place, count)
        case "eio":
            disk.torture_read(place, count, 1)
        case "short":
            disk.torture_read(place, count, 2)
        case "slow":
            disk.torture_slow(place, count)
