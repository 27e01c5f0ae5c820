"""What an export weighs: before it is made, as files, and on the devices that `hiermem plan` knows."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_hiermem import plan
from mlx_hiermem.convert.export.architecture import Architecture, Linear
from mlx_hiermem.convert.export.shape import Export
from mlx_hiermem.errors import OutputError

# Bytes of one file. Core ML maps weight.bin as a whole; an iPhone XR failed to map 1.3 GB (whisper.cpp #2456).
LARGEST = 1_000_000_000


def weight_bytes(
    sizes: Architecture,
    export: Export,
    formats: Mapping[str, str],
    weights: Sequence[Linear],
    size: Callable[[tuple[int, ...], str], int],
) -> int:
    """Of weight.bin, but for norms and padding, which are thousandths of it."""
    count = sum(size(one.weight.shape, formats.get(one.name, "fp16")) for one in weights)
    if sizes.head or not any(one.part is not None for one in weights):  # the embeddings are not among them
        count += 2 * sizes.embeddings.weight.size
    rotations = {layer.frequencies.tobytes() for layer in sizes.layers if layer.frequencies is not None}
    return count + len(rotations) * 4 * export.context * sizes.head_dim


def check_weights(count: int, out: pathlib.Path) -> None:
    """Raises OutputError where the anchor would be too large for a file, or for the disk."""
    if count > LARGEST:
        raise OutputError(
            f"the anchor's weights would be one file of {count / 1e9:.2f} GB",
            "Phones are reported not to map more than 1 GB: take fewer bits (--weights), or a smaller anchor.",
        )
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if 2 * count > free:
        raise OutputError(
            f"exporting needs {2 * count / 1e9:.1f} GB, the disk of {out} has {free / 1e9:.1f} GB free",
            "Free some space, or write to another disk.",
        )


def check_files(folder: pathlib.Path) -> None:
    """Raises OutputError for a file above 1 GB."""
    for file in sorted(folder.rglob("*")):
        if file.stat().st_size > LARGEST:
            name, count = file.relative_to(folder), file.stat().st_size / 1e9
            raise OutputError(f"{name} has {count:.2f} GB, more than the 1 GB that one file may have")


def on_devices(folder: pathlib.Path) -> list[dict[str, Any]]:
    """For each device of `hiermem plan`: bytes needed, bytes an app may have, seconds to read the packages once.

    At its first load Core ML also compiles a package for the device; how long that takes has not been measured.
    """
    model = plan.measure(folder)
    rows = []
    for name, device in plan.devices().items():
        result = plan.plan(model, device, [model.max_context])
        need = device.usable - result.contexts[0].left_bytes
        packages = model.anchor_bytes + (model.embedder_bytes if model.has_bank else 0)
        read = device.cold_ms(2, packages) / 1e3
        rows.append(
            {
                "device": name,
                "fits": result.fits,
                "need": need,
                "usable": device.usable,
                "first_read_s": round(read, 2),
            }
        )
    return rows


def warnings(rows: list[dict[str, Any]]) -> list[str]:
    """A line for the devices that the export does not fit on, and one on the first load."""
    small = [row["device"] for row in rows if not row["fits"]]
    found = []
    if small:
        need = rows[0]["need"]
        found.append(f"needs {need / 1e9:.2f} GB of memory, more than an app may have on {', '.join(small)}")
    slowest = max(rows, key=lambda row: row["first_read_s"])
    found.append(
        f"at the first load the system reads and compiles the packages: at least {slowest['first_read_s']:g} s on "
        f"{slowest['device']}, and as much again on its disk; it has not been measured on a device"
    )
    return found
