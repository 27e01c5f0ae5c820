"""A drive that is unplugged under a `hiermem chat` and a `hiermem serve`: as real as a machine without USB has it.

    python tests/torture/unplug.py        # Linux, as root

The bank is on an ext4 file system of its own, on a loop device. The device dies (its file is emptied, and what the
system had read of it is forgotten), so that every read ends with EIO; then the system lets the mount go, as it does
with a drive that is unplugged, under processes that have its files open and mapped. Later it is mounted again. All
of it in a mount namespace of this process, which takes everything with it.
"""

from __future__ import annotations

import http.client
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

sys.path[:0] = [str(pathlib.Path(__file__).parents[1])]

from torture.served import CONTEXT, MAIN, served  # noqa: E402

HERE, THERE, ELSEWHERE = "0.1", "0.2", "1.1"  # HERE is in memory when the drive goes, and so is what is above THERE
UNSHARED = "HIERMEM_UNPLUG"
LONGEST = 120.0  # seconds for an answer


class Drive:
    """A file system in a file, mounted at a folder."""

    def __init__(self, folder: pathlib.Path, at: pathlib.Path) -> None:
        self.file, self.copy, self.at = folder / "drive", folder / "copy", at
        with self.file.open("wb") as file:
            file.truncate(16 << 20)
        _run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", self.file)

    def plug_in(self) -> None:
        if self.copy.exists():
            shutil.copyfile(self.copy, self.file)
        _run("mount", "-o", "loop", self.file, self.at)

    def keep(self) -> None:
        """What is on it now is what will be plugged in again."""
        _run("sync", "-f", self.at)
        shutil.copyfile(self.file, self.copy)

    def die(self) -> None:
        """Nothing that has not been read can be read any more."""
        for file in self.at.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        os.truncate(self.file, 0)

    def go(self) -> None:
        """The mount is let go; who has its files open keeps them."""
        _run("umount", "--lazy", self.at)


def _run(*words: str | pathlib.Path) -> None:
    subprocess.run(words, check=True)


class Chat:
    """A `hiermem chat` that is spoken to through pipes."""

    def __init__(self, model: pathlib.Path) -> None:
        command = [sys.executable, "-c", MAIN, "chat", str(model), "--max-tokens", "6", "--memory", HERE]
        self.process = subprocess.Popen(
            command, stdin=-1, stdout=-1, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        self.lines = list[str]()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout
        self.lines.extend(line.rstrip("\n") for line in self.process.stdout)
        self.lines.append("(ended)")

    def ask(self, memory: str) -> list[str]:
        """The lines from a question to the figures of its reply."""
        assert self.process.stdin
        before = len(self.lines)
        self.process.stdin.write(f"/memory {memory}\nWhat is gold?\n")
        self.process.stdin.flush()
        ends = time.monotonic() + LONGEST
        while time.monotonic() < ends:
            said = self.lines[before:]
            if any("prefilled" in line or line == "(ended)" for line in said):
                time.sleep(0.5)  # a line on the drive comes behind
                return self.lines[before:]
            time.sleep(0.05)
        raise AssertionError(f"the chat says nothing after {self.lines[before:]}")

    def end(self) -> int:
        self.process.communicate()
        return self.process.returncode


def ask(port: int, memory: str) -> tuple[int, list[str], str]:
    """What a server answers: status, the blocks that came along, and the text or the error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONGEST)
    body = {"prompt": "What is gold?", "max_tokens": 6, "memory": memory}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = json.loads(answer.read())
    if answer.status != 200:
        return answer.status, [], str(data["error"]["message"])
    return 200, data["memory"]["blocks"], data["choices"][0]["text"]


def unplugged(folder: pathlib.Path) -> dict[str, object]:
    """Goes through it all; raises AssertionError where something is not as it must be. What was seen."""
    from tiny import LLAMA, make_anchor, make_bank

    model, seen = folder / "model", dict[str, object]()
    drive = Drive(folder, model / "bank")
    make_bank(folder / "made", make_anchor(model / "anchor", config=LLAMA | {"max_position_embeddings": CONTEXT}))
    drive.at.mkdir()
    drive.plug_in()
    shutil.copytree(folder / "made", drive.at, dirs_exist_ok=True)
    drive.keep()
    log = folder / "log.txt"
    with served(model, log) as server:
        chat = Chat(model)
        whole = {memory: ask(server.port, memory) for memory in (HERE, "0")}
        assert [row[:2] for row in whole.values()] == [(200, ["0", HERE]), (200, ["0"])]
        chat.ask(HERE)
        drive.die()
        status, _, error = ask(server.port, ELSEWHERE)
        seen["the device is dead: the server"] = f"{status} {error}".replace(str(folder), "")
        assert status >= 400, "a block was read from a device that is dead"
        assert "cannot read" in error, error
        assert ask(server.port, HERE) == whole[HERE], "what is in memory is there"
        said = chat.ask(ELSEWHERE)
        seen["the device is dead: the chat"] = _told(said, folder)
        assert "cannot read the block" in str(seen["the device is dead: the chat"])
        drive.go()
        assert ask(server.port, HERE) == whole[HERE]
        assert ask(server.port, THERE) == whole["0"], "what is above it is in memory"
        assert ask(server.port, ELSEWHERE)[:2] == (200, [])
        first, second = chat.ask(THERE), chat.ask(ELSEWHERE)
        assert sum("cannot be reached; the chat goes on" in line for line in first + second) == 1, first + second
        seen["the mount is gone: the chat"] = _told(first + second, folder)
        drive.plug_in()
        assert ask(server.port, THERE)[:2] == (200, ["0", THERE])
        said = chat.ask(THERE)
        assert any("the bank is back" in line for line in said), said
        seen["plugged in again: the chat"] = _told(said, folder)
        assert chat.end() == 1, "a line failed, and no more"
    told = log.read_text(errors="replace")
    assert told.count("cannot be reached: goes on with its cache") == 1, told
    assert told.count("is back") == 1, told
    return seen


def _told(lines: list[str], folder: pathlib.Path) -> str:
    """The one line of the program's own."""
    (told,) = [line for line in lines if line.startswith("hiermem: ")]
    return told.replace(str(folder), "")


def main() -> None:
    if not os.environ.get(UNSHARED):
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
        os.execvpe("unshare", command, os.environ | {UNSHARED: "1"})
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as name:
        print(json.dumps(unplugged(pathlib.Path(name)), indent=1))
        subprocess.run(["umount", "--lazy", pathlib.Path(name) / "model/bank"], check=False)


if __name__ == "__main__":
    main()
