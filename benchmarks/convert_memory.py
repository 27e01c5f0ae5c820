"""How fast and how small `convert_memory` is: a synthetic bank, against copying the same bytes on the same disk.

    python benchmarks/convert_memory.py              # 5 GB of safetensors, 1 GB of .pt; 13 GB of disk

The checkpoint has the paper's shape (arXiv:2510.02375: 35 layers of 512, branching 16, r = 16:4:1, bfloat16).
Copying (one file, shutil.copyfile, fsync) and converting (thousands of files, hashed, checked, synced) take turns,
each with the checkpoint on disk only ("cold": where a bank larger than memory always is) and each with it in the
page cache ("warm"); medians are compared. Every conversion is a process of its own, so that its peak resident
memory is its alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import common
import numpy as np

from mlx_hiermem.config import AnchorIdentity, MemoryConfig
from mlx_hiermem.convert.memories import AnchorDims, convert_memory

RESULTS = pathlib.Path(__file__).parent / "results" / "convert_memory.json"
BRANCHING, LAYERS, HIDDEN = 16, 35, 512
ANCHOR = AnchorIdentity("paper-160M", "", "", HIDDEN, LAYERS)
DIMS = AnchorDims(HIDDEN, 2048, 384, 384)
PIECE = 64 << 20


def design(gb: float) -> MemoryConfig:
    """r = 16:4:1, in all about `gb` GB."""
    one = MemoryConfig("ffn", BRANCHING, (16, 4, 1), tuple(range(LAYERS)), HIDDEN, "bfloat16")
    r = max(1, round(gb * 1e9 / (2 * one.bank_parameters)))
    return replace(one, block_sizes=(16 * r, 4 * r, r))


def make_checkpoint(file: pathlib.Path, config: MemoryConfig) -> None:
    """Random finite values in the documented layout, written in pieces."""
    header: dict[str, Any] = {}
    offset, k = 0, config.branching
    for level, units in enumerate(config.block_sizes, 1):
        tensors = {f"tree.level{level}.centroids": ("F32", (k ** (level - 1), k, 384), 4)}
        for name, part in (("w1", "gate"), ("w2", "up"), ("w3", "down")):
            tensors[f"memory.level{level}.{name}"] = ("BF16", (k**level, *config.shapes(units)[part]), 2)
        for name, (dtype, shape, width) in tensors.items():
            end = offset + int(np.prod(shape)) * width
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
            offset = end
    head = json.dumps(header).encode()
    # 0x3FFF keeps both bfloat16 and float32 finite: the largest is just below 2
    piece = (np.random.default_rng(0).integers(0, 1 << 16, PIECE // 2, dtype=np.uint16) & 0x3FFF).tobytes()
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for start in range(0, offset, PIECE):
            stream.write(piece[: min(PIECE, offset - start)])
        os.fsync(stream.fileno())


def to_pytorch(file: pathlib.Path) -> pathlib.Path:
    """The same tensors as .pt."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(file), file.with_suffix(".pt"))
    file.unlink()
    return file.with_suffix(".pt")


def prepare(file: pathlib.Path, cache: str) -> None:
    """Puts the file into the page cache, or out of it (which only Linux does on request)."""
    (common.drop if cache == "cold" else common.bring)([file])


def copy(file: pathlib.Path) -> float:
    """Seconds to copy, to the disk and not only to the cache."""
    target = file.with_suffix(".copy")
    start = time.perf_counter()
    shutil.copyfile(file, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def convert(file: pathlib.Path) -> dict[str, Any]:
    """One conversion in a process of its own."""
    out = file.with_suffix(".bank")
    command = [sys.executable, __file__, "--child", str(file), str(out)]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    result["files"] = sum(1 for entry in out.rglob("*") if entry.is_file())
    shutil.rmtree(out)
    return result


def child(file: pathlib.Path, out: pathlib.Path) -> None:
    """Converts and prints the seconds and the peak resident bytes."""
    if file.suffix == ".pt":
        import torch  # noqa: F401  (its import is no part of the conversion)
    start, cpu = time.perf_counter(), time.process_time()
    convert_memory(file, out, anchor=ANCHOR, anchor_dims=DIMS)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_rss": peak_rss()}))


def peak_rss() -> int:
    """Bytes. On Linux ru_maxrss also counts the parent at the moment of the fork, VmHWM does not."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(file: pathlib.Path, config: MemoryConfig, cache: str, runs: int) -> dict[str, Any]:
    size, copies, conversions, loads = file.stat().st_size, [], [], []
    for _ in range(runs):
        loads.append(os.getloadavg()[0])
        prepare(file, cache)
        copies.append(copy(file))
        prepare(file, cache)
        conversions.append(convert(file))
        print(f"  {file.name}, {cache}: copy {copies[-1]:.1f} s, convert {conversions[-1]}", flush=True)
    copy_seconds = statistics.median(copies)
    seconds = statistics.median(run["seconds"] for run in conversions)
    return {
        "form": f"{file.suffix}, {cache}",
        "bytes": size,
        "block_sizes": list(config.block_sizes),
        "largest_block": config.parameters(config.block_sizes[0]) * 2,
        "copies": copies,
        "conversions": conversions,
        "load_before": loads,  # of other processes too: both figures suffer, the conversion more
        "copy_gb_per_s": size / copy_seconds / 1e9,
        "convert_gb_per_s": size / seconds / 1e9,
        "speed_ratio": copy_seconds / seconds,
        "peak_rss": max(run["peak_rss"] for run in conversions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=5, help="size of the safetensors checkpoint, 0 for none")
    parser.add_argument("--pt-gb", type=float, default=1, help="size of the .pt checkpoint, made in memory")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--folder", type=pathlib.Path, help="where to write (default: the system's temporary folder)"
    )
    parser.add_argument("--child", nargs=2, type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        need, free = 2.5e9 * max(options.gb, options.pt_gb), shutil.disk_usage(folder).free
        if need > free:
            raise SystemExit(
                f"needs {need / 1e9:.0f} GB in {folder}, there are {free / 1e9:.0f}; see --folder and --gb"
            )
        for gb, pytorch in ((options.gb, False), (options.pt_gb, True)):
            if not gb:
                continue
            file, config = pathlib.Path(folder, "memory.safetensors"), design(gb)
            make_checkpoint(file, config)
            file = to_pytorch(file) if pytorch else file
            for cache in ("cold", "warm") if hasattr(os, "posix_fadvise") else ("warm",):
                rows.append(measure(file, config, cache, options.runs))
            file.unlink()
    machine = common.machine() | {"sha256_gb_per_s": sha256_speed()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    print_table(rows)


def sha256_speed() -> float:
    """GB per second and core, of which nothing here can do more: every block is hashed."""
    data = bytes(PIECE)
    start = time.process_time()
    for _ in range(4):
        hashlib.sha256(data)
    return 4 * PIECE / (time.process_time() - start) / 1e9


def print_table(rows: list[dict[str, Any]]) -> None:
    print("form, cache | GB | files | copy GB/s | convert GB/s | ratio | CPU s/GB | peak MB | largest block MB")
    for row in rows:
        cpu = statistics.median(run["cpu_seconds"] for run in row["conversions"]) / row["bytes"] * 1e9
        speeds = (row["copy_gb_per_s"], row["convert_gb_per_s"], row["speed_ratio"], cpu)
        cells = [row["form"], f"{row['bytes'] / 1e9:.2f}", str(row["conversions"][0]["files"])]
        cells += [f"{x:.2f}" for x in speeds] + [f"{row[key] / 1e6:.0f}" for key in ("peak_rss", "largest_block")]
        print(" | ".join(cells))


if __name__ == "__main__":
    main()
