"""Every command that writes, ended by SIGKILL at random moments or met by a failing disk, and what is found then.

    python tests/torture/kills.py --kills 200 --seed 1 --out benchmarks/results/kills.json
    python tests/torture/kills.py --kills 50 --how full read-only eio short slow

A command is killed at a random time, or just before a random change of the file system (of `learn` and `add` in
each of their stages in turn); or its disk (see disk.py) is full, read-only or unreadable from a random moment on,
of which it must tell in one line; or its disk is slow, or gives less than was asked for, which must change nothing.
Then what was there is there, or what was to come, and works; the same command, given again, ends with the files of
an undisturbed run and no others; `bank verify` finds nothing. Files that differ between two undisturbed runs,
because they hold times or random names, are compared by name only, and are listed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]  # before what is found there is imported: hence E402 below

import hub_server  # noqa: E402
from torture.child import child, look, prepare, process  # noqa: E402
from torture.commands import COMMANDS, REPO, Command, make_shared  # noqa: E402
from torture.disk import FAULTS, with_a_disk_that_fails  # noqa: E402

from mlx_hiermem import assets, cpu  # noqa: E402

Files = dict[str, bytes]
# Imported before anything is run, as each command runs in a copy of this process; but after the hub is there,
# as its client reads the environment when it is imported.
MODULES = ("mlx_hiermem.apps.cli.main", "mlx_hiermem.learn.run", "mlx_hiermem.learn.add", "mlx_lm", "tiny")


@dataclass
class Undisturbed:
    """What a command does when nothing happens to it."""

    start: pathlib.Path
    files: Files
    unstable: set[str]
    seconds: float
    stages: list[str]  # of each change of the file system
    head: Files | None  # of the hub's repository

    def same(self, now: Files, folder: str = "") -> bool:
        """Whether these are the files of an undisturbed run, or those of a folder of it."""
        wanted = below(self.files, folder) if folder else self.files
        return now.keys() == wanted.keys() and all(now[n] == wanted[n] for n in now.keys() - self.unstable)


# What is there


def contents(folder: pathlib.Path) -> Files:
    """Every file; of results of `eval` without what each answer cost."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _bytes(file) for file in files}


def _bytes(file: pathlib.Path) -> bytes:
    data = file.read_bytes()
    if file.parent.name != "results" or file.suffix != ".jsonl":
        return data
    rows = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    return b"".join(json.dumps({k: v for k, v in row.items() if k != "cost"}).encode() + b"\n" for row in rows)


def below(files: Files, folder: str) -> Files:
    return {name: data for name, data in files.items() if name.startswith(folder + "/")}


def words_of(one: Command, work: pathlib.Path) -> list[str]:
    leaf = work / "leaf"
    return [word.format(leaf=leaf.read_text() if leaf.exists() else "") for word in one.words]


class Campaign:
    """The trials of one command in a folder, against a hub of its own."""

    def __init__(self, one: Command, folder: pathlib.Path, hub: hub_server.HubServer) -> None:
        self.one, self.folder, self.hub = one, folder, hub
        self.log, self.start = folder / "log.txt", folder / one.name
        self.usual = self._undisturbed()

    def _undisturbed(self) -> Undisturbed:
        """Makes the start, and runs the command twice."""
        one, trace = self.one, self.folder / "trace.json"
        self.start.mkdir()
        status, _ = process(prepare, one.start, self.start, self.log)
        assert status == 0, f"the start of {one.name} cannot be made: {self._said()}"
        runs = list[tuple[Files, float, Files | None]]()
        for tracing in (trace, None):
            work = self._ready()
            status, seconds = process(child, work, words_of(one, work), self.log, 0, tracing)
            assert status == 0, f"{one.name} fails: {self._said()}"
            runs.append((contents(work), seconds, self._head()))
            shutil.rmtree(work.parent)
        (first, _, head), (second, seconds, _) = runs
        assert first.keys() == second.keys(), f"{one.name} makes {first.keys() ^ second.keys()} only once"
        unstable = {name for name in first if first[name] != second[name]}
        assert not any(name.startswith(one.bank + "/") for name in unstable), sorted(unstable)
        return Undisturbed(self.start, second, unstable, seconds, json.loads(trace.read_text()), head)

    def trial(self, number: int, how: str, rng: random.Random) -> tuple[list[str], str]:
        """Ends the command once. What came of it, and what is wrong then; empty where all is well."""
        work, usual, stage = self._ready(), self.usual, ""
        words = words_of(self.one, work)
        if how != "kill":
            status, _ = process(child, work, words, self.log, 0, None, (how, self._amount(how, rng)))
        elif number % 3 == 2:
            status, _ = process(child, work, words, self.log, after=rng.uniform(0.0, usual.seconds))
        else:
            stage, at = self._change(number, rng)
            status, _ = process(child, work, words, self.log, at)
        what = {0: "ended first", 1: "told", -signal.SIGKILL: "killed"}.get(status, f"ended with {status}")
        counts = [what, f"killed in {stage}"] if stage and what == "killed" else [what]
        told = [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("hiermem: ")]
        if how == "slow" and status:
            wrong = self._said()
        elif what in ("ended first", "killed") or (how != "kill" and told and "unexpected" not in told[-1]):
            wrong = self._judge(work)
        else:
            wrong = self._said()
        shutil.rmtree(work.parent)
        return counts, f"{what} {stage}: {wrong}" if wrong else ""

    def _change(self, number: int, rng: random.Random) -> tuple[str, int]:
        """A stage, and a change of the file system in it, counted from 1."""
        stages = self.usual.stages
        if not self.one.staged:
            return "", rng.randint(1, len(stages))
        known = list(dict.fromkeys(stages))
        stage = known[number % len(known)]
        return stage or "the beginning or end", rng.choice([at for at, s in enumerate(stages, 1) if s == stage])

    def _amount(self, how: str, rng: random.Random) -> int:
        """Bytes, changes or reads after which the disk fails; of a slow one the microseconds that each takes."""
        if how == "slow":
            return int(rng.uniform(1000, 20_000))
        written = sum(len(data) for name, data in self.usual.files.items() if not (self.start / name).exists())
        most = {"full": 2 * written + 4096, "read-only": len(self.usual.stages)}.get(how, 200)
        return int(rng.uniform(0, most))

    def _judge(self, work: pathlib.Path) -> str:
        """What is wrong with what was left, or with the command's second run; empty where all is well."""
        one, usual = self.one, self.usual
        if wrong := self._state(work):
            return wrong
        now = self._without_left(contents(work))
        done = (one.makes and (work / one.makes).exists()) or (one.once and usual.same(now))
        if not done:
            status, _ = process(child, work, words_of(one, work), self.log)
            if status:
                return f"the second run ends with {status}: {self._said()}"
            now = contents(work)
        if not usual.same(now):
            changed = [n for n in now.keys() & usual.files.keys() - usual.unstable if now[n] != usual.files[n]]
            return f"other files than undisturbed: {sorted([*changed, *(now.keys() ^ usual.files.keys())])[:6]}"
        if usual.head is not None and self._head() != usual.head:
            return "the repository holds something else"
        return self._look(work / one.bank, whole=True)

    def _without_left(self, files: Files) -> Files:
        """Without what a command that is done had yet to remove."""
        left = self.one.left
        return {name: data for name, data in files.items() if not (left and name.startswith(left))}

    def _state(self, work: pathlib.Path) -> str:
        """Whether what is there is what was there before, or what was to come."""
        one, usual, now = self.one, self.usual, contents(work)
        if one.makes and (made := below(now, one.makes)) and not usual.same(made, one.makes):
            return f"{one.makes} is there, and not whole"
        if one.changes and not (work / one.changes / "edit").exists():
            passing = (".partial", "forget.json")
            left = {n: d for n, d in below(now, one.changes).items() if not any(part in n for part in passing)}
            if left not in (below(contents(self.start), one.changes), below(usual.files, one.changes)):
                return f"{one.changes} is neither old nor new"
        for name, data in below(now, "results").items():
            if not usual.files[name].startswith(data):
                return f"{name} is no beginning of what was to come"
        head = self._head()
        if one.name == "push" and head is not None and head != usual.head and len(head) > 1:
            return "the repository is half"
        bank = work / one.bank
        return self._look(bank, whole=False) if bank.exists() else ""

    def _look(self, bank: pathlib.Path, whole: bool) -> str:
        said = self.folder / "said.txt"
        status, _ = process(look, bank, whole, said)
        return said.read_text() if status == 0 else f"the check ended with {status}"

    def _ready(self) -> pathlib.Path:
        """A work folder, and the hub, as they are before the command."""
        self.hub.repos.clear()
        self.hub.objects.clear()
        if self.one.name == "pull":
            model = self.folder / "shared"
            if not model.exists():
                process(prepare, make_shared, model, self.log)
            self.hub.repo(REPO).commit(contents(model))
        place = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
        return pathlib.Path(shutil.copytree(self.start, place / "work"))

    def _head(self) -> Files | None:
        repo = self.hub.repos.get(REPO)
        return dict(repo.head) if repo and repo.branches else None

    def _said(self) -> str:
        return self.log.read_text(errors="replace")[-300:]


def environment(hub: hub_server.HubServer, home: pathlib.Path) -> dict[str, str]:
    """The variables by which commands use this hub, the user's embedder, and no more of his."""
    cache = home / "cache"
    cache.mkdir()
    for name in assets.ASSETS:
        if (assets.cache_folder() / name).exists():
            (cache / name).symlink_to(assets.cache_folder() / name)
    return hub_server.environment(hub.url, home) | {"COLUMNS": "200"}


def warm(names: list[str]) -> None:
    """Imports what the commands will."""
    cpu.enable()  # before MLX
    for module in (*MODULES, *["coremltools"] * ("export" in names)):
        importlib.import_module(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="of each command, in each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--how", nargs="*", default=["kill"], choices=("kill", *FAULTS))
    parser.add_argument("--only", nargs="*", default=[], choices=[one.name for one in COMMANDS])
    parser.add_argument("--out", type=pathlib.Path, help="figures as JSON, from which a campaign goes on")
    asked = parser.parse_args()
    if asked.how != ["kill"]:
        with_a_disk_that_fails()
    with tempfile.TemporaryDirectory(prefix="torture-") as name, hub_server.serving() as hub:
        os.environ |= environment(hub, pathlib.Path(name))
        wanted = [one for one in COMMANDS if one.name in asked.only or not asked.only]
        warm([one.name for one in wanted])
        failed = sum(campaign(one, pathlib.Path(name), hub, asked) for one in wanted)
    sys.exit(1 if failed else 0)


def campaign(one: Command, folder: pathlib.Path, hub: hub_server.HubServer, asked: argparse.Namespace) -> int:
    """One command's trials, from where an earlier campaign of this seed stopped; returns how many went wrong."""
    failed, trials = 0, None
    for how in asked.how:
        row = read_figures(asked.out).get(f"{one.name}, {how}", {})
        if row.get("seed") != asked.seed:
            row = {"seed": asked.seed, "trials": 0, "counts": {}, "wrong": []}
        for number in range(row["trials"], asked.kills):
            trials = trials or Campaign(one, folder, hub)
            counts, wrong = trials.trial(number, how, random.Random(f"{asked.seed} {one.name} {how} {number}"))
            row["trials"] = number + 1
            row["counts"] = dict(Counter(row["counts"]) + Counter(counts))
            row["wrong"] += [f"{number}: {wrong}"] if wrong else []
            row["by name only"] = sorted(trials.usual.unstable)
            if asked.out:
                rows = read_figures(asked.out) | {f"{one.name}, {how}": row}
                asked.out.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        failed += len(row["wrong"])
        print(f"{one.name:9} {how}: {row['counts']}, wrong: {len(row['wrong'])}", *row["wrong"][:5], sep="\n    ")
        sys.stdout.flush()
    return failed


def read_figures(out: pathlib.Path | None) -> dict[str, Any]:
    return json.loads(out.read_text()) if out and out.exists() else {}


if __name__ == "__main__":
    main()
