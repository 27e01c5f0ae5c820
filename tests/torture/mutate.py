"""Making hostile files of good ones: bytes changed anywhere, JSON where it means something, archives inside.

Everything is drawn from a `random.Random`, so that a seed names an input; hypothesis can be that source too.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
import zlib
from typing import Any

BAD_ZIP = (zipfile.BadZipFile, NotImplementedError, EOFError)
DEEP: Any = json.loads("[" * 60 + "]" * 60)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "x", "0", "-1", "1_0", "٠", "../../x", "/etc/passwd", "a\x00b", "\ud800"),
    *(
        "\x1b[2J\x1b]0;owned\x07",
        "x" * 5000,
        "0." * 400 + "0",
        [],
        {},
        [[]],
        [None],
        {"": None},
        {"a": {"b": []}},
        DEEP,
    ),
)
TOKENS = (
    *(
        b"\x00",
        b"\xff",
        b"\xff" * 8,
        b"\x00" * 64,
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\x1b[2J",
        b"\n",
        b"\r",
        b'"',
    ),
    *(b"{", b"}", b"[", b"]", b"[" * 3000, b'{"a":' * 3000, b",", b":", b"1e999", b"-", b"9" * 5000),
    b"\\ud800",
    *(b"<" * 50, b"</", b"<!--", b"```", b"---\n", b"PK\x03\x04", b"%PDF-", b"../", b"\xfe\xff"),
)


def mutated(data: bytes, kind: str, rng: random.Random) -> bytes:
    """A hostile version of a file. `kind`: json, lines (of JSON), header (safetensors), zip, or bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.65 and kind in SPECIAL:
            try:
                data = SPECIAL[kind](data, rng)
                continue
            except (
                ValueError,
                KeyError,
                IndexError,
                zipfile.BadZipFile,
                RecursionError,
                OSError,
                NotImplementedError,
                OverflowError,
                zlib.error,
            ):
                pass  # an earlier change has made it something else
        data = changed_bytes(data, rng)
    return data


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 1, 2, 8, 64, 1000))
    new: bytes = rng.choice(TOKENS)
    match rng.randrange(7):
        case 0 if data:
            out = bytearray(data)
            out[at % len(data)] ^= 1 << rng.randrange(8)
            return bytes(out)
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[:at] + new + data[at:]
        case 4:
            return data[:at] + new + data[at + len(new) :]
        case 5:
            return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]
    return data[:at] + rng.randbytes(min(length, 64)) + data[at + length :]


def changed_json(data: bytes, rng: random.Random) -> bytes:
    value = changed_value(json.loads(data), rng)
    text = json.dumps(value, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.9)
    if rng.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + "," + text[1:]  # every name twice
    return text.encode("utf-8", "surrogatepass")


def changed_value(value: Any, rng: random.Random) -> Any:
    """One node of a JSON value replaced, removed, doubled or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return (
            _changed_entry(value, key, rng) if rng.random() < 0.3 else value | {key: changed_value(value[key], rng)}
        )
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        if rng.random() < 0.15:
            return value[:at] + value[at : at + 1] * rng.choice((0, 2, 300)) + value[at + 1 :]
        return [*value[:at], changed_value(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.4:
        return rng.choice((value + 1, -value, value * 2, value + 0.5, str(value), [value], value * 10**6))
    if isinstance(value, str) and rng.random() < 0.4:
        return rng.choice((value[:-1], value + "\x00", value * 3, [value], value.upper(), "\u202e" + value))
    return rng.choice(ODD)


def _changed_entry(value: dict[str, Any], key: str, rng: random.Random) -> Any:
    rest = {other: one for other, one in value.items() if other != key}
    new = rng.choice((None, key + "x", "", "__proto__", "9.9.9", "-1", "\x1b[2J"))
    return rest if new is None else rest | {new: value[key]}


def changed_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    if rng.random() < 0.3:
        return b"\n".join([*lines[:at], *([lines[at]] * rng.choice((0, 2, 40))), *lines[at + 1 :]])
    lines[at] = changed_json(lines[at], rng).replace(b"\n", b" ")
    return b"\n".join(lines)


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose table says something else, its length told rightly most of the time."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        raise ValueError
    head = changed_json(data[8 : 8 + length], rng)
    told = len(head) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63, len(head) + 1))
    return told.to_bytes(8, "little") + head + data[8 + length :]


def changed_archive(data: bytes, rng: random.Random) -> bytes:
    """A zip file with one member changed, renamed or blown up."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(parts))
    name, content = parts[at]
    match rng.randrange(6):
        case 0:
            parts.pop(at)
        case 1:
            parts[at] = (rng.choice(("../" * 4 + "x", "/etc/x", name + "x", "")), content)
        case 2:
            parts[at] = (name, content + b" " * 20_000_000)  # small as it is packed
        case _:
            parts[at] = (name, changed_bytes(content, rng))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return out.getvalue()


SPECIAL = {"json": changed_json, "lines": changed_lines, "header": changed_header, "zip": changed_archive}
