"""Small good texts of the kinds that the readers read."""

from __future__ import annotations

import json
import pathlib


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


SETTINGS = pathlib.Path(__file__).parents[1] / "elements" / "elements.toml"
QUESTION = {"id": 1, "prompt": "The symbol of gold is", "answer": "Au", "aliases": ["au"], "relation": "symbol"}
PROMPTS = (
    {"document": "a.txt", "prompt": "Gold is", "completion": "a metal"},
    {"document": "a.txt", "question": "What is gold?", "answer": "A metal."},
    {"document": "a", "messages": [{"role": "user", "content": "Gold?"}, {"role": "assistant", "content": "Au"}]},
)
HTML = "<html><head><title>Salt</title></head><body><article><h1>Salt</h1><p>Salt keeps food.</p></article></body>"
MARKDOWN = (
    "---\ntitle: Tea\n---\nIntro.\n\n# Green\nSteep it.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\n# code\n```\n"
)
KEYS = '[keys]\n"memory.{layer}.{level}.w1" = "layers.{layer}.{level}.gate"\n\n'
KEYS = 'transpose = ["layers.{layer}.{level}.gate"]\nignore = ["optimizer.*"]\n' + KEYS
TASKS = '[arc]\nkind = "multiple_choice"\nfile = "arc.jsonl"\nshots = 3\ngroup = "common"\n'
REMOTE = {"repo": "me/a", "revision": "c" * 40, "levels": [1], "subtrees": ["0.1"], "generic": True}
REMOTE |= {"disk_budget_bytes": 1000}
POLICY = {"blocked": ["0.1", "2"], "on_blocked": "parent", "reach": 1.2}
LEFT = {"format": "mlx-hiermem-without", "version": 1, "made_of": "a" * 64, "bank": "b" * 64, "nodes": ["0.1"]}
LEFT |= {"blocks": [{"path": "0.1", "bytes": 9, "sha256": "c" * 64}], "windows": 3, "may_retain": ["0"]}
LEFT_OUT = json.dumps(LEFT)
JSON_LINES = lines({"title": "a", "text": "b"}, {"text": "c"})
NAMES = "name;capital;area\nNorway;Oslo;385207\nPeru;Lima;1285216\n"
