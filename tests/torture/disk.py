"""A disk that fails on request: disk.c, put before the C library of a campaign's processes."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

FAULTS = ("full", "read-only", "eio", "short")


def fails() -> bool:
    """Whether this process's disk can be made to fail."""
    return "torture" in os.environ.get("LD_PRELOAD", "")


def with_a_disk_that_fails() -> None:
    """Starts this program again with disk.c before the C library, where there is a compiler."""
    if fails() or not shutil.which("cc") or not sys.platform.startswith("linux"):
        return
    library = pathlib.Path(tempfile.mkdtemp(prefix="torture-")) / "disk.so"
    source = pathlib.Path(__file__).with_name("disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": str(library)})


def fail(folder: pathlib.Path, how: str, after: int) -> None:
    """Has the disk fail for this process: it takes no more than `after` bytes; or after so many changes or reads
    below a folder it takes no change, gives nothing, or gives less than was asked for."""
    library, count, place = ctypes.CDLL(None), ctypes.c_long(after), os.fsencode(folder.resolve())
    match how:
        case "full":
            library.torture_full(count)
        case "read-only":
            library.torture_locked(place, count)
        case "eio":
            library.torture_read(place, count, 1)
        case "short":
            library.torture_read(place, count, 2)
