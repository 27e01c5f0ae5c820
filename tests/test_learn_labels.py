"""Labels of nodes: what sets a node apart, titles first, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable, Iterator

import pytest

from mlx_hiermem.learn.tree import labels


def test_labels_are_what_sets_a_node_apart() -> None:
    from mlx_hiermem.config import Path
    from mlx_hiermem.learn.corpus.windows import Window
    from mlx_hiermem.learn.tree.build import Placed

    subjects = ["bread dough oven", "bread dough flour", "harbour ship sail", "harbour ship anchor"]
    windows = [Window(i, i // 2, f"d{i // 2}.txt", "", f"the {words} there") for i, words in enumerate(subjects)]
    placed = [Placed(i, (Path((i // 2, i % 2)), Path((1 - i // 2,)))) for i in range(4)]
    learnt = [one.leaves[:1] for one in placed]
    learnt[0], learnt[3] = (Path((0, 0)), Path((1, 1))), ()  # one is learnt elsewhere too, one nowhere

    def again(numbers: Iterable[int]) -> Iterator[Window]:
        return (windows[number] for number in numbers)

    nodes = labels.describe(windows, again, placed, learnt, lambda text: len(text.split()))
    assert list(nodes) == ["0", "0.0", "0.1", "1", "1.0", "1.1"]
    assert [nodes[name]["sources"] for name in nodes] == [
        ["d0.txt"],
        ["d0.txt"],
        ["d0.txt"],
        ["d0.txt", "d1.txt"],
        ["d1.txt"],
        ["d0.txt"],
    ]
    assert set(nodes["0"]["label"].split(", ")[:2]) == {"bread", "dough"}
    assert set(nodes["1"]["label"].split(", ")[:2]) == {"harbour", "ship"}
    assert "the" not in nodes["0"]["label"].split(", ")
    assert "oven" in nodes["0.0"]["label"].split(", ")
    assert {key: nodes["1"][key] for key in ("documents", "windows", "tokens")} == {
        "documents": 1,
        "windows": 2,
        "tokens": 10,
    }
    json.dumps(nodes)


def test_titles_come_first_in_a_label() -> None:
    from mlx_hiermem.config import Path
    from mlx_hiermem.learn.corpus.windows import Window
    from mlx_hiermem.learn.tree.build import Placed

    about = {
        "Sourdough": "abiding brewer crumb",
        "Rye": "abiding brewer crumb",
        "Sloop": "mast keel",
        "": "mast keel",
    }
    windows = [Window(i, i, f"d{i}.txt", title, text) for i, (title, text) in enumerate(about.items())]
    placed = [Placed(i, (Path((i // 2,)),)) for i in range(4)]
    nodes = labels.describe(
        windows, lambda numbers: [windows[n] for n in numbers], placed, [one.leaves for one in placed], len
    )
    # A word of both is in as many windows as a title of one is not.
    assert nodes["0"]["label"].split(", ") == ["rye", "sourdough", "abiding"]
    assert nodes["1"]["label"].split(", ") == ["sloop", "keel", "mast"]


@pytest.mark.slow
def test_memory_for_labels_does_not_grow_with_the_terms_of_leaves() -> None:
    from mlx_hiermem.config import Path
    from mlx_hiermem.learn.corpus.windows import Window
    from mlx_hiermem.learn.tree.build import Placed

    def window(number: int) -> Window:
        letters = "abcdefghijklmnop"
        words = (
            f"{letters[number // 256]}{letters[number // 16 % 16]}{letters[number % 16]}{a}{b}"
            for a in letters
            for b in letters
        )
        return Window(number, number, f"{number}", "", " ".join(words))

    def peak(leaves: int) -> int:
        paths = [Path((number // 16 % 16, number // 256, number % 16)) for number in range(leaves)]
        tracemalloc.start()
        labels.describe(
            map(window, range(leaves)),
            lambda numbers: map(window, numbers),
            (Placed(number, (path,)) for number, path in enumerate(paths)),
            ([path] for path in paths),
            len,
        )
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(900) < peak(300) + 600 * 2_500  # the 256 terms of a leaf take ten times as much
