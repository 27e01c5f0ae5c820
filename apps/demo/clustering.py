"""The tree of the elements bank: which element lives in which leaf, and how text finds it.

A bank is only as good as its routing: a question that reaches another leaf than
the one its answer was learnt in gets no answer. Sentence embeddings mix what a
sentence is about with how it is put, so clusters of sentences partly are clusters
of wordings. Two steps keep the wording out of the tree:

1. cluster the elements, not the sentences: balanced k-means over the mean
   embedding of each element's training prompts;
2. move the centroids (a softmax over the distances, a few hundred Adam steps)
   until the prompts of each element fall into their element's cluster. The result
   still is a tree of centroids, routed by plain nearest-centroid descent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mlx_hiermem.apps.demo.wordings import Element, Wording

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tree:
    """A full tree: centroids per level ([k^(l-1), k, width]) and the leaf each element was put in."""

    centroids: list[Floats]
    home: Ints

    @property
    def branching(self) -> int:
        return self.centroids[0].shape[1]

    def route(self, vectors: Floats) -> Ints:
        """Leaf numbers (the path read as a base-k number) by greedy descent."""
        node = np.zeros(len(vectors), np.int64)
        for level in self.centroids:
            distance = ((vectors[:, None] - level[node]) ** 2).sum(-1)
            node = node * self.branching + distance.argmin(1)
        return node


def balanced_kmeans(points: Floats, k: int, rng: np.random.Generator, restarts: int = 10) -> tuple[Ints, Floats]:
    """k-means whose clusters differ in size by at most one step of rounding up."""
    capacity = -(-len(points) // k)
    best: tuple[float, Ints, Floats] | None = None
    for _ in range(restarts):
        centres = points[rng.choice(len(points), k, replace=False)]
        for _ in range(30):
            distance = ((points[:, None] - centres) ** 2).sum(-1)
            label = _assign(distance, capacity)
            moved = np.stack([points[label == j].mean(0) for j in range(k)])
            if np.allclose(moved, centres):
                break
            centres = moved
        inertia = float(distance[np.arange(len(points)), label].sum())
        if best is None or inertia < best[0]:
            best = inertia, label, centres
    assert best is not None
    return best[1], best[2]


def _assign(distance: Floats, capacity: int) -> Ints:
    """Nearest centre with room left; those who would lose most by waiting choose first."""
    two = np.sort(distance, axis=1)[:, :2]
    label = np.empty(len(distance), np.int64)
    room = np.full(distance.shape[1], capacity)
    for i in np.argsort(two[:, 0] - two[:, 1]):
        label[i] = next(j for j in distance[i].argsort() if room[j])
        room[label[i]] -= 1
    return label


def tune_centroids(centres: Floats, vectors: Floats, label: Ints, steps: int = 300) -> Floats:
    """Move centroids until each vector is nearest to the centroid of its label."""
    moving = torch.tensor(centres, requires_grad=True)
    points, target = torch.tensor(vectors), torch.tensor(label)
    optimiser = torch.optim.Adam([moving], lr=0.01)
    for _ in range(steps):
        # 30 turns distances of about 0.1 into logits that differ by a few units.
        loss = torch.nn.functional.cross_entropy(-30 * torch.cdist(points, moving) ** 2, target)
        # Stay near the k-means centroids, so that text of unseen form is treated alike.
        loss = loss + 1e-3 * (moving - torch.tensor(centres)).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return moving.detach().numpy()


def build_tree(vectors: Floats, element: Ints, k: int, depth: int, seed: int) -> Tree:
    """Tree over elements; `vectors` embed their prompts, `element[i]` says whose prompt i is."""
    rng = np.random.default_rng(seed)
    count = int(element.max()) + 1
    means = np.stack([vectors[element == e].mean(0) for e in range(count)])
    home, levels = np.zeros(count, np.int64), []
    for depth_ in range(depth):
        level = np.zeros((k**depth_, k, vectors.shape[1]), np.float32)
        child = np.zeros(count, np.int64)
        for node in range(k**depth_):
            members = np.flatnonzero(home == node)
            child[members], centres = balanced_kmeans(means[members], k, rng)
            own = np.isin(element, members)
            level[node] = tune_centroids(centres, vectors[own], child[element[own]])
        levels.append(level)
        home = home * k + child
    return Tree(levels, home)


def leaves_of_subjects(wordings: list[Wording], leaves: Ints) -> dict[str, list[int]]:
    """Every leaf that one of a subject's prompts routes to: there all its facts are learnt."""
    found: dict[str, set[int]] = defaultdict(set)
    for wording, leaf in zip(wordings, leaves, strict=True):
        found[wording.subject].add(int(leaf))
    return {subject: sorted(where) for subject, where in found.items()}


def node_members(tree: Tree) -> dict[str, list[int]]:
    """Node ("0" or "0.2") to the elements whose home lies in it."""
    k, depth = tree.branching, len(tree.centroids)
    members: dict[str, list[int]] = defaultdict(list)
    for element, leaf in enumerate(tree.home):
        digits = [str(int(leaf) // k ** (depth - 1 - level) % k) for level in range(depth)]
        for level in range(depth):
            members[".".join(digits[: level + 1])].append(element)
    return dict(sorted(members.items()))


def node_labels(members: dict[str, list[int]], elements: list[Element], means: Floats) -> dict[str, str]:
    """A label per node: its most telling series and three elements near the node's middle.

    The series is left out where fewer than three of the node's elements belong to it.
    """
    overall = Counter(e["series"] for e in elements)
    labels = {}
    for node, inside in members.items():
        here = Counter(elements[i]["series"] for i in inside)
        # Its share of the node times the node's share of it: frequent here and not everywhere.
        series = max(here, key=lambda s: here[s] ** 2 / overall[s])
        told = here[series] >= 3
        shown = [i for i in inside if elements[i]["series"] == series] if told else list(inside)
        distance = ((means[shown] - means[inside].mean(0)) ** 2).sum(1)
        names = ", ".join(elements[shown[i]]["name"] for i in distance.argsort()[:3])
        labels[node] = f"{series}: {names}" if told else names
    return labels
