"""Router: the embedder's vector is what the tree descends by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mlx_hiermem.embedder import Embedder
from mlx_hiermem.router import Router
from mlx_hiermem.tree import ClusterTree

TOPICS = ["chemistry: noble gases such as neon and argon", "cooking: how to bake bread", "football results"]
QUESTIONS = ["What is the atomic number of krypton?", "How long does dough have to rise?", "Who won the cup?"]


class Letters:
    """An embedder of one dimension that can be reckoned by hand: the text's length."""

    def __init__(self) -> None:
        self.calls = 0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.calls += 1
        return np.array([[len(text)] for text in texts], dtype=np.float32).reshape(-1, 1)


@pytest.fixture
def tree() -> ClusterTree:
    """Level 1 splits at 5 letters; level 2 is there for the short ones only."""
    first = np.array([[[2.0], [8.0]]], np.float32)
    second = np.array([[[1.0], [3.0]], [[0.0], [0.0]]], np.float32)
    return ClusterTree([first, second], [np.ones((1, 2), bool), np.array([[True, True], [False, False]])])


def test_path_and_distances(tree: ClusterTree) -> None:
    routed = Router(tree, Letters()).route("four")
    assert (str(routed.path), routed.distances) == ("0.1", (2.0, 1.0))
    assert routed.milliseconds > 0
    assert str(Router(tree, Letters()).route("many more").path) == "1"


def test_a_batch_is_its_texts_one_by_one(tree: ClusterTree) -> None:
    texts = ["", "a", "four", "many more"]
    router = Router(tree, embedder := Letters())
    batch = router.route_batch(texts)
    assert embedder.calls == 1
    one_by_one = [router.route(text) for text in texts]
    assert [(r.path, r.distances) for r in batch] == [(r.path, r.distances) for r in one_by_one]
    assert router.route_batch([]) == []


def test_questions_find_their_topic(minilm: Embedder) -> None:
    centroids = minilm.embed(TOPICS)[None]
    router = Router(ClusterTree([centroids], [np.ones((1, 3), bool)]), minilm)
    routed = router.route_batch(QUESTIONS)
    assert [r.path for r in routed] == [(0,), (1,), (2,)]
    similarity = (minilm.embed(QUESTIONS) * centroids[0]).sum(1)
    # of unit vectors: |a - b|^2 = 2 - 2 a.b
    assert [r.distances[0] for r in routed] == pytest.approx(np.sqrt(2 - 2 * similarity), abs=1e-5)
