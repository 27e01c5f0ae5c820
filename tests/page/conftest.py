"""What the tests of the page share: the server that they open, and replies that end soon."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import pytest
from browsing import load_aimed, make_paged, replies_cut
from serving import Running, serving

from mlx_hiermem.model import MemoryModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_paged(tmp_path_factory.mktemp("page") / "model")


@pytest.fixture(scope="module")
def loading(folder: pathlib.Path) -> Callable[[], MemoryModel]:
    return lambda: load_aimed(folder)


@pytest.fixture(scope="module", autouse=True)
def short_replies() -> Iterator[None]:
    with replies_cut():
        yield


@pytest.fixture(scope="module")
def server(loading: Callable[[], MemoryModel]) -> Iterator[Running]:
    with serving(loading) as running:
        yield running
