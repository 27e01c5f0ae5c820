"""A reply: its text while it grows, and what is known of it in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from mlx_hiermem.selection import Selection
from mlx_hiermem.source_search import Source

Find = Callable[[], "tuple[Source, ...] | None"]

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse


@dataclass(frozen=True)
class Response:
    """A reply. Printing it prints its text."""

    text: str
    finish_reason: str  # stop (the text's end), length (max_tokens), or empty: it was not read to its end
    selection: Selection  # the memory that it came with
    prompt_tokens: int
    generation_tokens: int
    tokens_per_second: float  # of the generation
    find: Find = field(default=lambda: None, repr=False, compare=False)  # looks for the sources

    @cached_property
    def sources(self) -> tuple[Source, ...] | None:
        """What in the bank says this, best first; looked for when first asked, while the model is there.

        Empty where the path's leaf has nothing that does. None where there was nothing to look through: no path,
        or a bank without sources.
        """
        return self.find()

    @classmethod
    def of(
        cls,
        text: GrowingText,
        last: GenerationResponse,
        selection: Selection,
        find: Find,
        prompt_tokens: int | None = None,
    ) -> Response:
        """From the last piece that mlx-lm gave. `prompt_tokens`: where a part of the prompt was in the cache."""
        return cls(
            text=text.text,
            finish_reason="stop" if text.stopped else last.finish_reason or "",
            selection=selection,
            prompt_tokens=last.prompt_tokens if prompt_tokens is None else prompt_tokens,
            generation_tokens=last.generation_tokens,
            tokens_per_second=last.generation_tps,
            find=find,
        )

    def __str__(self) -> str:
        return self.text


class GrowingText:
    """The text so far, up to the first stop string; `add` says what of it can be shown."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops, self.text = stops, ""
        self.stopped = False  # at a stop string, which is not part of the text
        self._shown = 0

    def add(self, piece: str, last: bool = False) -> str:
        """What can be shown now: nothing that may turn out to be a stop string, unless it is the `last` piece."""
        self.text += piece
        found = [at for stop in self.stops if (at := self.text.find(stop, self._shown)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        held = 0 if found or last else held_back(self.text[self._shown :], self.stops)
        start, self._shown = self._shown, len(self.text) - held
        return self.text[start : self._shown]


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of a text that is the beginning of a stop string."""
    ends = [
        length
        for stop in stops
        for length in range(1, min(len(stop) - 1, len(text)) + 1)
        if text.endswith(stop[:length])
    ]
    return max(ends, default=0)
