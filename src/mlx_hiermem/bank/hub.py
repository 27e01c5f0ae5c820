"""Talking to the model hub: which commit, which files, one download, and errors in words of our own.

A repository holds a memory model as it is on disk: anchor/, bank/ and README.md. Everything is asked for by
commit, never by branch, and a file counts only when its digest is the expected one. huggingface_hub, which
honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and proxies, is imported where it is needed.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.errors import HierMemError, HubError, OutputError
from mlx_hiermem.files import file_digest

PROBE_SECONDS = 5.0  # the hub answers within this time or counts as out of reach
AGAIN = "Run the same command again: it goes on where it stopped."


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, by its name there, and the digest it must have.

    The hub knows large files by their sha256 and small ones by git's blob id; bank.json has sha256 for all.
    """

    name: str
    bytes: int
    sha256: str = ""
    blob: str = ""

    def __post_init__(self) -> None:
        if ".." in pathlib.PurePosixPath(self.name).parts or self.name.startswith("/"):
            raise HubError(f"the repository has a file named '{self.name}', which leads out of its folder")

    def is_at(self, file: pathlib.Path) -> bool:
        """Whether `file` is this one, by size and digest."""
        if not file.is_file() or file.stat().st_size != self.bytes:
            return False
        return file_digest(file) == self.sha256 if self.sha256 else git_blob(file) == self.blob


def git_blob(file: pathlib.Path) -> str:
    """git's id of a file's content."""
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def commit_of(repo: str, revision: str | None = None) -> str:
    """The commit that a branch, tag or shortened hash names now; by default the head of main."""
    from huggingface_hub import HfApi

    with speaking(repo, revision):
        return str(HfApi().model_info(repo, revision=revision, expand=["sha"], timeout=2 * PROBE_SECONDS).sha)


def listing(repo: str, commit: str, folder: str | None = None, recursive: bool = False) -> list[RemoteFile]:
    """The files of one folder of a repository (its root by default); empty where it has no such folder."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    with speaking(repo, commit):
        try:
            rows = list(HfApi().list_repo_tree(repo, folder, revision=commit, recursive=recursive))
        except EntryNotFoundError:
            return []
    files = [row for row in rows if isinstance(row, RepoFile)]
    return [RemoteFile(f.path, f.size, f.lfs.sha256 if f.lfs else "", f.blob_id) for f in files]


def download(
    repo: str, commit: str, file: RemoteFile, folder: pathlib.Path, count: Callable[[int], None] | None = None
) -> pathlib.Path:
    """Downloads one file below `folder` and checks it; `count` is told of every piece that arrives.

    An interrupted download leaves what came so far in `folder`, where the next one continues.
    """
    from huggingface_hub import hf_hub_download

    meter: dict[str, Any] = {"tqdm_class": _counter(count)} if count else {}
    with speaking(repo, commit):
        path = pathlib.Path(hf_hub_download(repo, file.name, revision=commit, local_dir=folder, **meter))
    if not file.is_at(path):
        path.unlink()
        raise HubError(
            f"{file.name} of {repo} is not what the digests say it must be, and was thrown away",
            f"{AGAIN} If it stays like this, the repository is damaged: tell its owner.",
        )
    return path


def probe(repo: str, commit: str, name: str) -> None:
    """Raises HubError within seconds where the hub cannot be reached; hf_hub_download retries for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with speaking(repo, commit):
        get_hf_file_metadata(hf_hub_url(repo, name, revision=commit), timeout=PROBE_SECONDS)


def _counter(count: Callable[[int], None]) -> type:
    """A progress bar that nobody sees, for huggingface_hub to feed."""
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})
            count(kwargs.get("initial", 0))

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

    return Counter


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """No warnings of huggingface_hub (what matters arrives as an error), and no bars unless asked for."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, hide = logging.get_verbosity(), not bars and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hide:
            enable_progress_bars()


@contextmanager
def speaking(repo: str, revision: str | None = None) -> Iterator[None]:
    """Raises a HubError (OutputError where the disk is at fault) for whatever huggingface_hub raises inside."""
    try:
        yield
    except HierMemError:
        raise
    except Exception as error:  # each of huggingface_hub's HTTP libraries has errors of its own
        raise _explained(error, repo, revision) from error


def _explained(error: Exception, repo: str, revision: str | None) -> HierMemError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "not in the local cache either" is no news; why not from the hub, is
    status = getattr(getattr(error, "response", None), "status_code", 0)
    at = f" at revision {revision}" if revision else ""
    match error:
        case errors.HFValidationError():
            return HubError(f"'{repo}' is no repository id", "Write organisation/name.")
        case errors.OfflineModeIsEnabled():
            return HubError("the hub may not be asked: HF_HUB_OFFLINE is set", "Unset it to go online.")
        case errors.GatedRepoError():
            return HubError(f"access to {repo} must be asked for", f"Do so at {constants.ENDPOINT}/{repo}.")
        case errors.RepositoryNotFoundError():
            return HubError(
                f"the hub has no repository {repo}, or it is private",
                "Check the name; for a private one log in with `hf auth login`, or set HF_TOKEN.",
            )
        case errors.RevisionNotFoundError():
            return HubError(f"{repo} has no revision {revision}", "Give a branch, a tag or a commit.")
        case errors.EntryNotFoundError():
            return HubError(f"{repo}{at} lacks a file that a memory model has", "Is it one?")
        case OSError() if error.errno:  # errors of HTTP have none
            return OutputError(
                f"cannot write what {repo} sends: {error.strerror}", "Free space or choose a folder."
            )
    if status in STATUS:
        return HubError(*(text.format(repo=repo) for text in STATUS[status]))
    if status:
        return HubError(f"the hub answered {status} for {repo}{at}", f"Try again later. {AGAIN}")
    reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
    return HubError(
        f"cannot reach the hub at {constants.ENDPOINT}: {reason}", f"Check the connection and HF_ENDPOINT. {AGAIN}"
    )


STATUS = {
    401: ("the hub does not accept your token", "Log in with `hf auth login`, or set HF_TOKEN."),
    403: ("your token may not write to {repo}", "Use one with write access, or a repository of your own."),
    409: ("{repo} exists already, and is not yours to write to", "Choose another name."),
    412: ("somebody else has pushed to {repo} meanwhile", "Look at what is there, then push again."),
}
