"""Documents that say again what an earlier one says, which are left out.

Equal documents are found by digest, nearly equal ones by MinHash (Broder, 1997). A document is the set of its runs
of `RUN` words. MinHash estimates how much of two such sets is common: the share of equal values in their
signatures. Documents that share a band of values are compared, and the later one goes if `ALIKE` of their runs are
common. That is much: in a short document one other word already makes another fact, and is kept.
"""

from __future__ import annotations

import hashlib
import pathlib
import sqlite3
import zlib
from types import TracebackType

import numpy as np

RUN = 5  # words, of which a document is a set when it is compared
ALIKE = 0.95  # of the runs that two documents have in common, for the later one to go
VALUES, BAND = 128, 16  # values in a signature, and in each of its bands; 8 bands find 99 % of pairs alike by 0.95
PRIME = (1 << 31) - 1


class Seen:
    """The documents so far, in a SQLite file, so that memory does not grow with the corpus; it goes in the end."""

    def __init__(self, file: pathlib.Path) -> None:
        file.unlink(missing_ok=True)
        self.file, self.database = file, sqlite3.connect(file, isolation_level=None)
        # A crash means reading the corpus again, so nothing need reach the disk in order.
        self.database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE digests (digest BLOB PRIMARY KEY, what TEXT) WITHOUT ROWID;
            CREATE TABLE signatures (id INTEGER PRIMARY KEY, what TEXT, signature BLOB);
            CREATE TABLE bands (band BLOB, id INTEGER, PRIMARY KEY (band, id)) WITHOUT ROWID;
            BEGIN;
            """
        )
        rng = np.random.default_rng(0)
        self.a, self.b = (rng.integers(1, PRIME, (VALUES, 1), dtype=np.uint64) for _ in range(2))

    def __enter__(self) -> Seen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.close()
        self.file.unlink(missing_ok=True)

    def before(self, what: str, text: str) -> str:
        """Why `text` is a duplicate, naming the earlier one; "" if it is not, and then it counts as `what`."""
        words = text.lower().split()
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
        same = self.database.execute("SELECT what FROM digests WHERE digest = ?", (digest,)).fetchone()
        if same:
            return f"the same as {same[0]}"
        signature = self.signature(words)
        bands = [bytes([i]) + part.tobytes() for i, part in enumerate(signature.reshape(-1, BAND))]
        if near := self._nearest(bands, signature):
            return near
        self.database.execute("INSERT INTO digests VALUES (?, ?)", (digest, what))
        row = self.database.execute(
            "INSERT INTO signatures (what, signature) VALUES (?, ?)", (what, signature.tobytes())
        )
        self.database.executemany(
            "INSERT OR IGNORE INTO bands VALUES (?, ?)",
            ((hashlib.blake2b(band, digest_size=8).digest(), row.lastrowid) for band in bands),
        )
        return ""

    def signature(self, words: list[str]) -> np.ndarray:
        """[VALUES] uint32: for each of that many random orders of all runs, the first that the document has."""
        # With margins, so that the first word counts as much as the others: often it is what the text is about.
        words = [*[""] * (RUN - 1), *words, *[""] * (RUN - 1)]
        runs = {" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
        hashes = np.array([zlib.crc32(run.encode()) % PRIME for run in runs], np.uint64)
        least = np.full((VALUES, 1), PRIME, np.uint64)
        for start in range(0, len(hashes), 4096):
            mixed = (self.a * hashes[start : start + 4096] + self.b) % PRIME
            least = np.minimum(least, mixed.min(1, keepdims=True))
        return least[:, 0].astype(np.uint32)

    def _nearest(self, bands: list[bytes], signature: np.ndarray) -> str:
        for band in bands:
            rows = self.database.execute(
                "SELECT what, signature FROM bands JOIN signatures USING (id) WHERE band = ? LIMIT 64",
                (hashlib.blake2b(band, digest_size=8).digest(),),
            )
            for what, stored in rows:
                alike = float(np.mean(np.frombuffer(stored, np.uint32) == signature))
                if alike >= ALIKE:
                    return f"{alike:.0%} the same as {what}"
        return ""
