"""A little library to learn: made-up villages, in sentences that only differ in their facts."""

from __future__ import annotations

import json
import pathlib

VILLAGES = ["Ashford", "Birchley", "Calder", "Dunmore", "Elmstead", "Farley", "Glenwood", "Harrow", "Ivybridge"]
VILLAGES += ["Jarrow", "Kelso", "Linton", "Marlow", "Norwell", "Oakham", "Penrith"]
THINGS = ["bread", "wool", "pottery", "clocks", "cheese", "paper", "glass", "honey", "boots", "candles"]
COUNT = 12  # villages of the library; the others are learnt later


def fact(number: int) -> tuple[str, str, str]:
    """(village, what it makes, its inhabitants)."""
    return VILLAGES[number], THINGS[number * 7 % len(THINGS)], str(100 + 37 * number)


def text(number: int) -> str:
    name, thing, people = fact(number)
    return f"The village of {name} makes {thing}. There are {people} people who live in {name}."


def write_library(folder: pathlib.Path, count: int = COUNT, first: int = 0) -> pathlib.Path:
    """A folder of one text a village, and files that nobody can learn from."""
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        (folder / f"{VILLAGES[number]}.txt").write_text(text(number) + "\n", encoding="utf-8")
    (folder / "picture.txt").write_bytes(b"\x00\x01\x02 binary")
    (folder / "table.xls").write_text("a,b\n")
    return folder


def write_study(file: pathlib.Path, count: int = COUNT) -> pathlib.Path:
    """What self-study might have written about the library's windows."""
    with file.open("w", encoding="utf-8") as stream:
        for window in range(count):
            name, thing, people = fact(window)
            rows = [
                {"question": f"What does {name} make?", "answer": thing, "chat": True},
                {"prompt": f"The people of {name} number", "answer": people},
                {"answer": f"{thing} comes from {name}."},
            ]
            stream.writelines(json.dumps({"window": window} | row) + "\n" for row in rows)
    return file
