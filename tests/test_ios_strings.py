"""The sample app's strings: each is in the catalogue, in English and in German, and none there is unused."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

APP = pathlib.Path(__file__).parents[1] / "apps/ios/HierMemChat/Sources"
CATALOGUE = APP / "Localizable.xcstrings"
# What takes a key of the catalogue. `verbatim:` does not, and neither do system names of pictures.
TAKES_A_KEY = re.compile(
    r"\b(?:Text|Button|Tab|Label|Section|TextField|ProgressView|LabeledContent|ContentUnavailableView|Gauge"
    r"|String\(localized:\s*|navigationTitle|alert|accessibilityLabel|accessibilityValue|accessibilityHint)"
    r"\(?\s*(?=\")"
)


def literal(text: str, start: int) -> str:
    """The string that begins at the quotation mark, as a catalogue has it: what is filled in is %@."""
    key, place = "", start + 1
    while text[place] != '"':
        if text.startswith("\\(", place):
            depth, place = 1, place + 2
            while depth:
                depth += {"(": 1, ")": -1}.get(text[place], 0)
                place += 1
            key += "%@"
        else:
            key += text[place]
            place += 1
    return key


def keys(source: str) -> set[str]:
    return {literal(source, match.end()) for match in TAKES_A_KEY.finditer(source)}


@pytest.fixture(scope="module")
def strings() -> dict[str, dict]:
    catalogue = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    assert catalogue["sourceLanguage"] == "en"
    return catalogue["strings"]


@pytest.fixture(scope="module")
def used() -> set[str]:
    return set.union(*(keys(file.read_text(encoding="utf-8")) for file in APP.glob("*.swift")))


def test_the_catalogue_is_complete(strings: dict[str, dict], used: set[str]) -> None:
    assert len(used) > 30
    assert used - set(strings) == set()
    assert set(strings) - used == set()


def test_every_string_is_translated(strings: dict[str, dict]) -> None:
    for key, entry in strings.items():
        unit = entry["localizations"]["de"]["stringUnit"]
        assert unit["state"] == "translated"
        assert unit["value"].count("%") == key.count("%"), key


def test_no_string_is_chosen_unseen() -> None:
    """`Text(flag ? "a" : "b")` would not be found above: each branch has a Text of its own."""
    for file in APP.glob("*Screen.swift"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert '? "' not in line or "verbatim" in line or "systemName" in line, line


def test_what_is_filled_in_is_found() -> None:
    source = 'Text("from \\(name(of: x)) on") Text(verbatim: "no") Button("Stop", systemImage: "stop") { }'
    assert keys(source) == {"from %@ on", "Stop"}
    assert keys('String(localized: "\\(size(1)) in all")') == {"%@ in all"}
