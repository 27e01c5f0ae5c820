"""What is published: a wheel from a zip of the sources, installed where nothing else of ours is.

The package lies in three folders (src/mlx_hiermem, convert, apps). pip unpacks a zip without git, and turns a
symbolic link into a text file: a folder that pyproject.toml forgets is missing in the wheel without any error.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile

import pytest

import mlx_hiermem

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = {"src/mlx_hiermem": "mlx_hiermem", "convert": "mlx_hiermem/convert", "apps": "mlx_hiermem/apps"}
OTHER = ("apps/ios/",)  # Swift
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

in_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="these sources are no git checkout")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@in_git
def test_no_symbolic_links() -> None:
    links = [line.split("\t")[1] for line in git("ls-files", "--stage").splitlines() if line.startswith("120000")]
    assert links == [], "a zip of the sources, and so pip, would make text files of them"


def test_every_package_folder_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            inside = file.parent.relative_to(ROOT / folder).parts
            found.add(".".join((*package.split("/"), *inside)))
    assert found == listed


def test_one_source_of_the_version() -> None:
    """`__version__`; pyproject.toml reads it. What may not read it must say the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert "version" not in project
    if (citation := ROOT / "CITATION.cff").exists():
        assert re.findall(r"^version: (.*)$", citation.read_text(), re.M) in ([], [mlx_hiermem.__version__])
    changes = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", changes, re.M)
    assert headings[0] == "Unreleased"
    assert (
        mlx_hiermem.__version__ in headings
        or f"Will be {mlx_hiermem.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    )


def build(sources: pathlib.Path, what: str, out: pathlib.Path) -> pathlib.Path:
    """A wheel or sdist, made as pip makes it but for the environment that it would download."""
    out.mkdir()
    time = {"SOURCE_DATE_EPOCH": "1767225600"}
    subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{what}", str(out)],
        cwd=sources, env=clean_environment() | time, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    [file] = out.iterdir()
    return file


def clean_environment() -> dict[str, str]:
    """This one's, without what would make the checkout importable."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The last commit, as GitHub gives it out and pip unpacks it."""
    folder = tmp_path_factory.mktemp("zip")
    git("archive", "--format=zip", "--prefix=sources/", f"--output={folder / 'sources.zip'}", "HEAD")
    zipfile.ZipFile(folder / "sources.zip").extractall(folder)
    return folder / "sources"


@pytest.fixture(scope="module")
def wheel(sources: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build(sources, "wheel", tmp_path_factory.mktemp("wheel") / "dist")


def test_actions_are_pinned_to_a_commit() -> None:
    """A tag can be moved to other code."""
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    used = [line for file in workflows for line in re.findall(r"uses:.*", file.read_text(encoding="utf-8"))]
    assert len(used) > 10
    assert not [line for line in used if not re.fullmatch(r"uses: [\w./-]+@[0-9a-f]{40}  # v\d.*", line)]


@pytest.mark.slow
@in_git
def test_wheel_has_every_file(sources: pathlib.Path, wheel: pathlib.Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for folder, package in FOLDERS.items():
        for file in (sources / folder).rglob("*"):
            if file.is_file() and not file.relative_to(sources).as_posix().startswith(OTHER):
                expected.add(f"{package}/{file.relative_to(sources / folder).as_posix()}")
    assert expected - packed == set(), "pyproject.toml's packages or package-data leave these out"
    assert {name for name in packed - expected if ".dist-info/" not in name} == set()
    assert any(name.endswith("licenses/LICENSE") for name in packed)


@pytest.mark.slow
@in_git
def test_sdist_gives_the_same_wheel(sources: pathlib.Path, wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It has all that a wheel is made of, and a build of the same sources is the same to the byte."""
    with tarfile.open(build(sources, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, "wheel", tmp_path / "dist")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)
    assert digest(again) == digest(wheel)
    assert (unpacked / "tests" / "conftest.py").is_file(), "who packages this wants to run the tests"


def contents(wheel: pathlib.Path) -> dict[str, int]:
    return {info.filename: info.CRC for info in zipfile.ZipFile(wheel).infolist()}


def digest(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.slow
@in_git
def test_the_installed_wheel_does_what_the_demo_does_first(
    wheel: pathlib.Path, smollm2_gguf: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """In an environment of its own, with this one's packages but not this checkout, on the real weights."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=120)
    [site] = environment.glob("lib/python*/site-packages")
    # a plain path: unlike a site folder, its own .pth files, and so the editable install, are not followed
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    imported = (
        "import mlx_hiermem, mlx_hiermem.convert as c, mlx_hiermem.apps as a; print(mlx_hiermem.__file__, c, a)"
    )
    assert run(str(python), "-c", imported).count(str(site)) == 3
    hiermem = str(environment / "bin" / "hiermem")
    assert run(hiermem, "--version").strip() == f"hiermem {mlx_hiermem.__version__}"
    assert "demo" in run(hiermem, "--help")
    prepare = "from mlx_hiermem.apps.demo import tour; print(tour.prepare(lambda line: None))"
    folder = run(str(python), "-c", prepare).strip()
    told = json.loads(run(hiermem, "ask", "What is the capital of Laos?", "-m", folder, "--json"))
    assert "Vientiane" in told["text"]
    assert told["selection"]["memory"] == "fetched"
