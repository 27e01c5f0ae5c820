"""Which memory is wanted: the words for it, the same in Python, on the command line, in requests and in chats."""

from __future__ import annotations

from typing import ClassVar

from mlx_hiermem.config import ROOT, Path
from mlx_hiermem.errors import HierMemError

EARLIER_WORDS = {"auto": "fetched", "on": "fetched", "routed": "fetched", "off": "none"}  # still understood


class MemoryChoice(str):
    """Which memory is wanted, in a word or as a path such as `3.1`.

    none            the anchor alone
    generic         the control block, the same for every text
    fetched         the blocks on the text's own path
    source          retrieval: the best passage of the path's leaf in the prompt, and no block
    fetched+source  both
    """

    WORDS = ("none", "generic", "fetched", "source", "fetched+source")
    NONE: ClassVar[MemoryChoice]
    GENERIC: ClassVar[MemoryChoice]
    FETCHED: ClassVar[MemoryChoice]
    SOURCE: ClassVar[MemoryChoice]
    FETCHED_SOURCE: ClassVar[MemoryChoice]

    @property
    def path(self) -> Path:
        """The path that was named; the root where none was."""
        return ROOT if self in self.WORDS else Path.parse(self)

    @property
    def is_routed(self) -> bool:
        """Whether each text goes by a path of its own."""
        return self in (self.FETCHED, self.SOURCE, self.FETCHED_SOURCE)

    @property
    def has_blocks(self) -> bool:
        """Whether blocks are attached."""
        return self not in (self.NONE, self.SOURCE)

    @property
    def has_passage(self) -> bool:
        """Whether a passage goes into the prompt."""
        return self in (self.SOURCE, self.FETCHED_SOURCE)

    @classmethod
    def parse(cls, wanted: Path | str) -> MemoryChoice:
        """A choice from its text, which may be an earlier word for it. Raises HierMemError for anything else."""
        text = str(wanted) if isinstance(wanted, Path | str) else ""
        word = EARLIER_WORDS.get(text, text)
        try:
            return cls(word if word in cls.WORDS else Path.parse(word))
        except HierMemError as error:
            hint = f"Use {', '.join(cls.WORDS)}, or a path such as 10.7."
            raise HierMemError(f"unknown memory {wanted!r}", hint) from error


MemoryChoice.NONE, MemoryChoice.GENERIC, MemoryChoice.FETCHED = map(MemoryChoice, MemoryChoice.WORDS[:3])
MemoryChoice.SOURCE, MemoryChoice.FETCHED_SOURCE = map(MemoryChoice, MemoryChoice.WORDS[3:])
