"""Foreign tensor names -> documented ones, by a small TOML table (`--key-map`; docs/convert.md).

transpose = ["memory.level{level}.w3"]          # stored [.., d, r] there; read as [.., r, d]
ignore = ["optimizer.*"]                        # shell patterns of names that are not wanted

[keys]
"bank.l{level}.gate" = "memory.level{level}.w1"
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from mlx_hiermem.convert.readers import plain_name
from mlx_hiermem.errors import CheckpointError
from mlx_hiermem.files import parse_toml

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}", re.ASCII)


@dataclass(frozen=True)
class KeyMap:
    """Templates: `{level}` stands for digits, any other `{word}` for a piece of name without dots."""

    keys: Mapping[str, str] = field(default_factory=dict)
    transpose: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for foreign, ours in self.keys.items():
            unknown = set(PLACEHOLDER.findall(ours)) - set(PLACEHOLDER.findall(foreign))
            if unknown:
                raise CheckpointError(
                    f'the key map\'s entry "{foreign}" = "{ours}" uses {{{unknown.pop()}}} on the right only'
                )

    @classmethod
    def read(cls, file: pathlib.Path) -> KeyMap:
        """Raises CheckpointError where the file is missing or not a key map."""
        try:
            table = parse_toml(file.read_text(encoding="utf-8"))
            keys, transpose, ignore = (table.pop(name, {}) for name in ("keys", "transpose", "ignore"))
            if table:
                raise ValueError(f"unknown entries {', '.join(table)}")
            if not all(isinstance(name, str) for name in (*keys.values(), *transpose, *ignore)):
                raise ValueError("every entry must be a text")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(f"cannot read the key map {file}: {error}", "See docs/convert.md.") from error
        return cls(keys, tuple(transpose), tuple(ignore))

    def documented(self, names: Iterable[str]) -> dict[str, str]:
        """documented name -> name in the checkpoint. Names that no entry matches stand for themselves.

        Raises CheckpointError if two tensors would get the same name.
        """
        found: dict[str, str] = {}
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in self.ignore):
                continue
            bare = plain_name(name)
            ours = self._translate(name) or self._translate(bare) or bare
            if ours in found:
                raise CheckpointError(f"both {found[ours]} and {name} would be {ours}", "Change the key map.")
            found[ours] = name
        return found

    def transposed(self, name: str) -> bool:
        """Whether a documented name is stored with its last two axes the other way round."""
        return any(_pattern(template).fullmatch(name) for template in self.transpose)

    def _translate(self, name: str) -> str | None:
        for foreign, ours in self.keys.items():
            match = _pattern(foreign).fullmatch(name)
            if match:
                groups = match.groupdict()
                return "".join(groups[s] if i % 2 else s for i, s in enumerate(PLACEHOLDER.split(ours)))
        return None


def _pattern(template: str) -> re.Pattern[str]:
    """Template -> regular expression with one group per placeholder; one that recurs must match the same."""
    seen: set[str] = set()

    def group(word: str) -> str:
        if word in seen:
            return f"(?P={word})"
        seen.add(word)
        return rf"(?P<{word}>\d+)" if word == "level" else rf"(?P<{word}>[^.]+)"

    pieces = PLACEHOLDER.split(template)  # text, word, text, word, ..., text
    return re.compile("".join(group(s) if i % 2 else re.escape(s) for i, s in enumerate(pieces)))
