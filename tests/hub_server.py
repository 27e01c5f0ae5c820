"""A model hub on 127.0.0.1: as much of its protocol as huggingface_hub needs to upload and to download.

Repositories live in memory: commits, each a whole set of files, and branches that name one. That of a data set is
called datasets/owner/name, which can be read only. Faults can be
ordered: a connection that breaks off in the middle of a file, a file that never comes, other bytes in its place.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import pathlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.remote import node_of
from mlx_hiermem.config import Path

TOKEN = "hf_test"
CLOSED = "http://127.0.0.1:9"  # nobody listens on the discard port
REPO = "me/tiny"  # where the fixture `shared` puts a tiny model
BLOCKS = {"0", "1", "2"} | {f"{a}.{b}" for a in range(3) for b in range(3)}  # its nodes
LARGE = (".safetensors", ".bin")  # kept outside git, and known by their sha256


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content

    def commit(self, files: dict[str, bytes], branch: str = "main", sha: str = "") -> str:
        """Adds a commit that holds exactly these files; returns its hash."""
        sha = sha or hashlib.sha1(f"{branch}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class HubServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # uploaded large files, by sha256
        self.requests: list[str] = []
        self.cut: dict[str, int] = {}  # file name -> bytes to send before the connection breaks; then 503
        self.stall: set[str] = set()  # file names whose content never comes
        self.instead: dict[str, bytes] = {}  # file name -> what is sent in its place
        self.sending: dict[str, Callable[[], Any]] = {}  # file name -> what happens while it is sent
        self.meanwhile: Callable[[], Any] = lambda: None  # happens just before a commit is taken
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def repo(self, name: str) -> Repository:
        return self.repos.setdefault(name, Repository())

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for, in order, since `requests` was last cleared."""
        gets = (request.split(" ", 1)[1] for request in self.requests if request.startswith("GET "))
        return [path.split("/resolve/", 1)[1].split("/", 1)[1] for path in gets if "/resolve/" in path]

    def handle_error(self, *_: Any) -> None:
        """A client that went away is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: two would wait for each other's acknowledgement

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        self._api() if self.path.startswith("/api/") else self._file(body=True)

    def do_PUT(self) -> None:
        content = self._log_and_read()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self._answer(200)

    def do_POST(self) -> None:
        content = self._log_and_read()
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(content))
        name, action, rest = self._api_parts()
        repo = self.server.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        match action:
            case "branch":
                repo.branches.setdefault(rest, repo.branches["main"])
                self._answer(200)
            case "preupload":
                files = json.loads(content)["files"]
                self._json({"files": [self._mode(file["path"]) for file in files]})
            case "commit":
                self._commit(name, repo, rest, [json.loads(line) for line in content.splitlines()])
            case _:
                self._refuse(404)

    def _create(self, body: dict[str, Any]) -> None:
        name = f"{body['organization']}/{body['name']}"
        if name.startswith("foreign/"):
            return self._refuse(403, message="You don't have the rights to create a model under this namespace")
        if name in self.server.repos:
            return self._refuse(409, message="You already created this model repo")
        self.server.repo(name).private = body.get("visibility") == "private" or bool(body.get("private"))
        self.server.repo(name).commit({".gitattributes": b"*.safetensors filter=lfs"})
        self._json({"url": f"{self.server.url}/{name}"})

    def _mode(self, path: str) -> dict[str, Any]:
        return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}

    def _batch(self, body: dict[str, Any]) -> None:
        objects = []
        for wanted in body["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/upload/{wanted['oid']}"}}
            known = wanted["oid"] in self.server.objects
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | ({} if known else {"actions": upload}))
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
        self.server.meanwhile()
        head = repo.branches.get(branch)
        if head is None:
            return self._refuse(404, "RevisionNotFound")
        files = dict(repo.commits[head])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header" if value.get("parentCommit", head) != head:
                    return self._refuse(412, message="A commit has happened since. Please refresh and try again.")
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repo.commit(files, branch)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def _api(self) -> None:
        self._log_and_read()
        name, action, rest = self._api_parts()
        repo = self._visible(name)
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        revision, _, folder = rest.partition("/")
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.commits:
            return self._refuse(404, "RevisionNotFound")
        files = repo.commits[sha]
        if action == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            rows = list(tree_rows(files, folder, recursive))
            return self._json(rows) if rows else self._refuse(404, "EntryNotFound")
        self._json({"id": name, "sha": sha, "private": repo.private, "siblings": [{"rfilename": f} for f in files]})

    def _api_parts(self) -> tuple[str, str, str]:
        """/api/models/org/name/tree/main/bank -> ("org/name", "tree", "main/bank")."""
        kind, *parts = unquote(urlsplit(self.path).path).removeprefix("/api/").split("/")
        name = "/".join(parts[:2])
        return name if kind == "models" else f"{kind}/{name}", [*parts, ""][2], "/".join(parts[3:])

    def _visible(self, name: str) -> Repository | None:
        repo = self.server.repos.get(name)
        hidden = repo is not None and repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        return None if hidden else repo

    def _file(self, body: bool) -> None:
        self._log_and_read()
        name, _, rest = unquote(urlsplit(self.path).path)[1:].partition("/resolve/")
        revision, _, path = rest.partition("/")
        repo = self._visible(name)
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        sha = repo.branches.get(revision, revision)
        content = repo.commits.get(sha, {}).get(path)
        if content is None:
            return self._refuse(404, "EntryNotFound" if sha in repo.commits else "RevisionNotFound", commit=sha)
        large = path.endswith(LARGE)
        etag = hashlib.sha256(content).hexdigest() if large else git_blob(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Content-Length": str(len(content))}
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))} if large else {}
        if not body:
            return self._answer(200, headers)
        content = self.server.instead.get(path, content)
        self.server.sending.get(path, lambda: None)()
        if path in self.server.stall:
            self.server.released.wait(60)
        if path in self.server.cut:
            return self._break_off(path, headers, content)
        self._answer(200, headers, content)

    def _break_off(self, path: str, headers: dict[str, str], content: bytes) -> None:
        size = self.server.cut[path]
        if size < 0:
            return self._refuse(503)
        self.server.cut[path] = -1
        self._answer(200, headers, content[:size])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _log_and_read(self) -> bytes:
        self.server.requests.append(f"{self.command} {self.path}")
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._answer(200, {"Content-Type": "application/json"} | _length(data := json.dumps(value).encode()), data)

    def _refuse(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._answer(status, {key: value for key, value in headers.items() if value})

    def log_message(self, *_: object) -> None:
        pass


def _length(data: bytes) -> dict[str, str]:
    return {"Content-Length": str(len(data))}


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_rows(files: dict[str, bytes], folder: str, recursive: bool) -> Iterator[dict[str, Any]]:
    """What the tree endpoint lists below a folder; without `recursive` its direct children only."""
    prefix, folders = f"{folder}/" if folder else "", set()
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        head, slash, _ = path.removeprefix(prefix).partition("/")
        if slash and not recursive:
            if head not in folders:
                yield {"type": "directory", "path": prefix + head, "oid": "0" * 40, "size": 0}
            folders.add(head)
            continue
        row = {"type": "file", "path": path, "oid": git_blob(content), "size": len(content)}
        if path.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            row["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        yield row


@contextmanager
def serving() -> Iterator[HubServer]:
    """A hub that answers until the end of the block."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def environment(url: str, home: pathlib.Path, token: str = TOKEN) -> dict[str, str]:
    """The variables by which a new process uses this hub, and nothing of the user's own."""
    values = {"HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "HIERMEM_CACHE": str(home / "cache")}
    return values | {"HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def use_in_this_process(monkeypatch: pytest.MonkeyPatch, url: str, home: pathlib.Path, token: str = TOKEN) -> None:
    """The same for huggingface_hub in this process, which read its environment when it was imported."""
    from huggingface_hub import constants

    for key, value in environment(url, home, token).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))


def files_of(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}


def blocks_in(folder: pathlib.Path) -> set[str]:
    return {
        str(node_of(name.removeprefix("bank/"))) for name in files_of(folder) if name.startswith("bank/blocks/")
    }


def copy(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(model, folder))


def remote_name(node: str) -> str:
    return "bank/" + block_name(Path.parse(node))
