"""The chemical elements: 118 documents, their questions, and the bank that learnt them. See README.md."""

import pathlib

FOLDER = pathlib.Path(__file__).parent
DOCUMENTS = FOLDER / "elements.jsonl"
SETTINGS = FOLDER / "elements.toml"
# `hiermem demo` asks about the elements, so these two are in the package.
DEMO = FOLDER.parents[1] / "apps" / "demo"
QUESTIONS = DEMO / "elements_qa.jsonl"
BANK = DEMO / "bank"
