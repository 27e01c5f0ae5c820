"""The clustering beside scikit-learn's, and its time for a million vectors.

    python benchmarks/clustering.py              inertia and balance on the elements' sentences and on made vectors
    python benchmarks/clustering.py --million    the time of 1 000 000 x 384 vectors into 16^3 leaves

Ours samples and balances, as arXiv:2510.02375, App. C, has it; scikit-learn's k-means sees every vector at every
step and has no bound on a cluster's size. So its inertia is the mark to come near, and its largest cluster shows
what the balance is for. The made vectors lie around centres of very different weight: alike ones balance easily.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import common
import numpy as np
from elements import DOCUMENTS

from mlx_hiermem.learn.tree.kmeans import BALANCE, Shape, assign, grow, kmeans, squared
from mlx_hiermem.learn.tree.probes import write_vectors
from mlx_hiermem.sentences import sentences

RESULTS = pathlib.Path(__file__).parent / "results"
DIM, CENTRES, K = 384, 200, 16


def made(count: int, seed: int = 0, chunk: int = 10_000) -> Iterator[np.ndarray]:
    """Unit vectors in chunks, around `CENTRES` directions that fall off as 1/rank."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(CENTRES, DIM)).astype(np.float32)
    weight = 1 / np.arange(1, CENTRES + 1)
    for start in range(0, count, chunk):
        drawn = rng.choice(CENTRES, min(chunk, count - start), p=weight / weight.sum())
        points = middles[drawn] + 0.7 * rng.normal(size=(len(drawn), DIM)).astype(np.float32)
        yield points / np.linalg.norm(points, axis=1, keepdims=True)


def element_sentences() -> np.ndarray:
    """[1070, 384] embeddings of the elements' sentences."""
    from mlx_hiermem.embedder import Embedder

    rows = map(json.loads, DOCUMENTS.read_text(encoding="utf-8").splitlines())
    return Embedder.load().embed([sentence for row in rows for sentence in sentences(row["text"])])


def compare(name: str, points: np.ndarray, seeds: range = range(3)) -> list[dict[str, Any]]:
    """One level of 16, ours and scikit-learn's: inertia a vector, largest cluster by its even share, seconds."""
    from sklearn.cluster import KMeans

    found = []
    for way in ("ours", "scikit-learn"):
        rows = []
        for seed in seeds:
            start = time.perf_counter()
            if way == "ours":
                rng = np.random.default_rng(seed)
                centroids = kmeans(points, np.arange(len(points)), K, rng)
                child = assign(points, np.arange(len(points)), centroids, math.ceil(BALANCE * len(points) / K))
            else:
                model = KMeans(K, init="k-means++", n_init=1, random_state=seed).fit(points)
                centroids, child = model.cluster_centers_, model.labels_
            seconds = time.perf_counter() - start
            distance = squared(points, centroids)
            rows.append(
                {
                    "inertia": float(distance[np.arange(len(points)), child].mean()),
                    "nearest": float(distance.min(1).mean()),  # were nobody sent elsewhere for want of room
                    "largest": float(np.bincount(child, minlength=K).max() * K / len(points)),
                    "seconds": seconds,
                }
            )
        means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        found.append({"vectors": name, "count": len(points), "way": way, **means, "seeds": rows})
        print(name, way, means, file=sys.stderr, flush=True)
    return found


def million(count: int, shape: Shape) -> dict[str, Any]:
    """Vectors on disk into a tree: seconds, the leaves' sizes and the memory it took."""
    with tempfile.TemporaryDirectory() as folder:
        points = write_vectors(made(count), count, DIM, pathlib.Path(folder, "vectors.npy"))
        start = time.perf_counter()
        grown = grow(points, shape)
        seconds = time.perf_counter() - start
    leaves = grown.level.astype(np.int64) << 32 | grown.row
    sizes = np.unique(leaves, return_counts=True)[1]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "count": count,
        "shape": [shape.branching, shape.depth],
        "seconds": seconds,
        "leaves": len(sizes),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,  # what is mapped counts too
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--million", action="store_true", help="time a million vectors instead")
    parser.add_argument("--count", type=int, default=1_000_000, help="vectors of --million")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": common.machine()}
    if arguments.million:
        name = "clustering_million"
        report |= million(arguments.count, Shape(16, 3))
        print(json.dumps(report, indent=1))
    else:
        name = "clustering"
        report["rows"] = compare("elements' sentences", element_sentences())
        report["rows"] += compare("made", np.concatenate(list(made(50_000))))
        print("| vectors | k-means | inertia | to the nearest | largest cluster | seconds |")
        print("|---|---|---|---|---|---|")
        for row in report["rows"]:
            figures = f"{row['inertia']:.4f} | {row['nearest']:.4f} | {row['largest']:.2f} x | {row['seconds']:.2f}"
            print(f"| {row['count']} {row['vectors']} | {row['way']} | {figures} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
