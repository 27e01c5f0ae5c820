"""`hiermem learn` as its user meets it: a model folder that everything else reads, kills, ranks, bad input."""

from __future__ import annotations

import hashlib
import json
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from books import COUNT, VILLAGES, write_library
from command_line import Result, Run, runner
from mlx.utils import tree_flatten
from mlx_lm.models import mamba
from tiny import make_tokenizer

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.errors import OutputError
from mlx_hiermem.learn.work import Ranks, read_rows

pytestmark = pytest.mark.real  # the sentence embedder

QUICK = ("--config", str(pathlib.Path(__file__).with_name("quick.toml")), "--json")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, on a wide terminal."""
    return runner(monkeypatch, capfd, columns=300)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_library(tmp_path_factory.mktemp("library") / "books")


def command(library: pathlib.Path, out: pathlib.Path, anchor: pathlib.Path) -> list[str]:
    script = pathlib.Path(sys.executable).with_name("hiermem")
    return [str(script), "learn", str(library), str(out), "--anchor", str(anchor), *QUICK[:-1]]


@pytest.fixture(scope="module", autouse=True)
def _one_blas_thread() -> Iterator[None]:
    """In every process that is started: the last bits of a product depend on how many threads share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def whole(library: pathlib.Path, anchor: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model of an unbroken run. Do not write into it."""
    out = tmp_path_factory.mktemp("whole") / "model"
    done = subprocess.run(command(library, out, anchor), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for line in (
        f"corpus    {COUNT} documents in {COUNT} windows; 2 skipped",
        "tree",
        "written",
        "Talk to it: hiermem chat",
    ):
        assert line in done.stdout
    return out


def digests(model: pathlib.Path) -> dict[str, str]:
    """Every file of a model's anchor and bank."""
    files = (file for part in ("anchor", "bank") for file in sorted((model / part).rglob("*")) if file.is_file())
    return {str(file.relative_to(model)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_model_is_whole(whole: pathlib.Path, run: Run) -> None:
    assert not whole.with_name("model.learn").exists()
    checked = run("bank", "verify", whole)
    assert checked.code == 0, checked.out
    bank = MemoryBank.open(whole / "bank")
    assert (bank.config.branching, bank.config.block_sizes, bank.config.layers) == (2, (82, 82), (0, 1, 2, 3))
    assert sum(bank.manifest.blocks[node].documents for node in bank.tree.nodes(1)) == COUNT
    leaves = [bank.manifest.blocks[node] for node in bank.tree.nodes(2)]
    assert all(leaf.label and leaf.tokens and leaf.sources for leaf in leaves)
    assert {source for leaf in leaves for source in leaf.sources} == {f"{name}.txt" for name in VILLAGES[:COUNT]}
    assert bank.manifest.recipe["settings"]["training"]["epochs"] == 6
    why = {row["what"]: row["why"] for row in read_rows(whole / "learning" / "skipped.jsonl")}
    assert why == {"picture.txt": "binary, not text", "table.xls": "no reader for .xls"}


@pytest.mark.real
def test_it_has_learnt(whole: pathlib.Path, run: Run) -> None:
    report = json.loads((whole / "learning" / "report.json").read_text())
    figures = report["perplexity"]
    assert figures["none"] > 1.5 * figures["generic"]
    assert figures["none"] > 1.5 * figures["fetched"]
    assert report["perplexity_of"] == "learnt texts"
    assert (whole / "learning" / "loss.png").read_bytes().startswith(b"\x89PNG")

    def selection(text: str) -> dict[str, Any]:
        return json.loads(run("ask", "--plain", "-m", whole, text, "-n", "4", "--json").out)["selection"]

    about = selection(f"The village of {VILLAGES[0]} makes")
    assert (about["memory"], about["far"], len(about["blocks"])) == ("fetched", False, 2)
    other = selection("How are photons absorbed by a semiconductor?")
    assert (other["memory"], other["far"], len(other["blocks"])) == ("fetched", True, 0)


def test_a_killed_run_ends_with_the_same_model(
    whole: pathlib.Path, library: pathlib.Path, anchor: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Killed in every stage: as soon as the one before it has said its line."""
    out = tmp_path / "model"
    for said in ("corpus", "tree", "examples", "training"):
        process = subprocess.Popen(command(library, out, anchor), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(said):
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL, f"it ended before it said {said}"
        assert not out.exists()
    done = subprocess.run(command(library, out, anchor), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(whole)
    assert not out.with_name("model.learn").exists()


def test_two_ranks_make_the_model_of_one(
    whole: pathlib.Path, library: pathlib.Path, anchor: pathlib.Path, tmp_path: pathlib.Path, two_ranks: list[str]
) -> None:
    done = subprocess.run(
        [*two_ranks, *command(library, tmp_path / "model", anchor)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "model") == digests(whole)
    assert done.stdout.count("Talk to it") == 1  # one of them speaks


def test_a_rank_stops_where_the_first_one_failed(
    tmp_path: pathlib.Path, anchor: pathlib.Path, two_ranks: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    call = command(tmp_path / "empty", tmp_path / "model", anchor)
    done = subprocess.run([*two_ranks, *call], capture_output=True, text=True, timeout=300)
    assert "there is nothing to learn" in done.stderr  # and the other does not wait for ever, or this would


def test_a_rank_learns_that_the_first_one_failed(tmp_path: pathlib.Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.count = 2  # of which this test is both
    with pytest.raises(KeyError), ranks.leading():
        raise KeyError
    with pytest.raises(OutputError, match="the first rank stopped"):
        ranks.follow({})
    with ranks.leading():
        pass
    ranks.follow({})


@pytest.fixture
def poor_anchor(tmp_path: pathlib.Path) -> pathlib.Path:
    """A state-space model: its layers have nothing that a memory could join."""
    config = {"model_type": "mamba", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "state_size": 8}
    config |= {
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 2,
    }
    folder = tmp_path / "poor" / "anchor"
    folder.mkdir(parents=True)
    parameters = mamba.Model(mamba.ModelArgs.from_dict(config)).parameters()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(parameters)))
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    return folder.parent


def one_line(result: Result, *parts: str) -> None:
    """It failed with one line that says these things."""
    assert result.code == 1, result.out + result.err
    assert len(result.err.strip().splitlines()) == 1
    for part in parts:
        assert part in result.err


def inputs(tmp_path: pathlib.Path) -> Iterator[tuple[pathlib.Path, tuple[str, ...]]]:
    """Folders that cannot be learnt, and what is said of them."""
    for name in ("empty", "binary", "one", "french"):
        (tmp_path / name).mkdir()
    yield tmp_path / "empty", ("there is nothing to learn",)
    (tmp_path / "binary" / "a.txt").write_bytes(bytes(range(256)))
    yield tmp_path / "binary", ("there is nothing to learn", "a.txt is skipped")
    (tmp_path / "one" / "a.txt").write_text("A single sentence stands here.")
    yield tmp_path / "one", ("1 window of text", "two or more")
    for number in range(4):
        french = "Les chercheurs ont étudié plusieurs phénomènes météorologiques près des côtes méditerranéennes."
        (tmp_path / "french" / f"{number}.txt").write_text(f"{french} Numéro {number} de la série entière.")
    yield tmp_path / "french", ("does not seem to be in English", "--any-language")
    yield tmp_path / "nowhere", ("there is no file or folder",)


@pytest.mark.real
def test_bad_documents_get_one_line(tmp_path: pathlib.Path, anchor: pathlib.Path, run: Run) -> None:
    for folder, said in inputs(tmp_path):
        one_line(run("learn", folder, tmp_path / "out", "--anchor", anchor, *QUICK), *said)
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.learn").exists() == (folder.name == "one")  # of which there is a corpus
        shutil.rmtree(tmp_path / "out.learn", ignore_errors=True)


def test_documents_are_looked_for_before_an_anchor_is_fetched(tmp_path: pathlib.Path, run: Run) -> None:
    missing = run("learn", tmp_path / "nowhere", tmp_path / "out", "--anchor", tmp_path / "gone", *QUICK)
    one_line(missing, "there is no file or folder", "nowhere")
    assert not (tmp_path / "out.learn").exists()


def test_bad_anchors_get_one_line(
    tmp_path: pathlib.Path, library: pathlib.Path, anchor: pathlib.Path, poor_anchor: pathlib.Path, run: Run
) -> None:
    out = tmp_path / "out"
    one_line(run("learn", library, out, "--anchor", tmp_path / "gone", *QUICK), "gone")
    one_line(run("learn", library, out, "--anchor", poor_anchor, *QUICK), "mamba", "cannot carry")
    (tmp_path / "layers.toml").write_text("[memory]\nplacement = [9]\n")
    layers = ("--config", tmp_path / "layers.toml")
    one_line(run("learn", library, out, "--anchor", anchor, *layers), "layer 9", "4 layers")
    one_line(run("learn", library, anchor, "--anchor", anchor, *QUICK), "exists already")
    assert not out.exists()
    assert not out.with_name("out.learn").exists()


def test_bad_questions_get_one_line(tmp_path: pathlib.Path, anchor: pathlib.Path, run: Run) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"question": "Where is wool made?"}\n')
    result = run("learn", tmp_path, tmp_path / "out", "--anchor", anchor, "--questions", asked, *QUICK)
    one_line(result, "asked.jsonl: line 1 has no 'document'")


def bounded(call: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    """Runs a command whose files cannot grow beyond so many bytes."""

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return subprocess.run(call, capture_output=True, text=True, timeout=300, preexec_fn=bound)


@pytest.mark.real
def test_a_full_disk_gets_one_line_and_loses_nothing(
    whole: pathlib.Path, library: pathlib.Path, anchor: pathlib.Path, tmp_path: pathlib.Path, run: Run
) -> None:
    """Files cannot grow beyond some size: first the anchor's, then those of later stages."""
    out = tmp_path / "model"
    call = command(library, out, anchor)
    (tmp_path / "empty").mkdir()
    for limit in (2_000, 100_000):
        failed = bounded(call, limit)
        assert "cannot write" in failed.stderr.splitlines()[-1]
        assert failed.returncode == 1
        assert not out.exists()
        run("learn", tmp_path / "empty", out, "--anchor", anchor)  # which does no more than copy the anchor
    asked = tmp_path / "asked.jsonl"
    rows = ({"question": f"What does {name} make?", "document": name} for name in VILLAGES[:COUNT])
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = [*call, "--json", "--questions", str(asked)]
    done = subprocess.run(again, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["given_agreement"] > 0.8
    assert digests(out) == digests(whole)
