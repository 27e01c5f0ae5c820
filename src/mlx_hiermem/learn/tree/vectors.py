"""Embeddings of many texts, in a .npy file that is written as they come and read as a memory map."""

from __future__ import annotations

import io
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable

import numpy as np

from mlx_hiermem.router import TextEmbedder

BATCH = 512  # texts embedded together, and lost by a crash at most

Progress = Callable[[int, int], None]  # (done, all)


def embed(
    texts: Iterable[str], count: int, file: pathlib.Path, embedder: TextEmbedder, progress: Progress | None = None
) -> np.ndarray:
    """[count, dim] float32 in `file`, as a memory map. An interrupted `.part` of the same texts is continued."""
    part = file.with_name(file.name + ".part")
    dim = embedder.embed([""]).shape[1]
    header = _header(count, dim)
    with part.open("r+b" if part.exists() else "w+b") as stream:
        # Whole batches: a text's last bits depend on those that it is embedded with.
        done = max(stream.seek(0, os.SEEK_END) - len(header), 0) // (4 * dim) // BATCH * BATCH
        stream.seek(0)
        stream.write(header)
        stream.truncate(len(header) + done * 4 * dim)
        stream.seek(0, os.SEEK_END)
        rest = itertools.islice(texts, done, None)
        while batch := list(itertools.islice(rest, BATCH)):
            stream.write(np.ascontiguousarray(embedder.embed(batch), "<f4").tobytes())
            stream.flush()
            done += len(batch)
            if progress:
                progress(done, count)
    os.replace(part, file)
    return np.load(file, mmap_mode="r")


def write(chunks: Iterable[np.ndarray], count: int, dim: int, file: pathlib.Path) -> np.ndarray:
    """The same file from chunks of vectors."""
    part = file.with_name(file.name + ".tmp")
    with part.open("wb") as stream:
        stream.write(_header(count, dim))
        for chunk in chunks:
            stream.write(np.ascontiguousarray(chunk, "<f4").tobytes())
    os.replace(part, file)
    return np.load(file, mmap_mode="r")


def _header(count: int, dim: int) -> bytes:
    """What a .npy file of [count, dim] float32 begins with; always equally long."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (count, dim)})
    return out.getvalue()
