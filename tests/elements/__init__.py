"""The chemical elements: 118 documents, their questions, and the bank that learnt them. See README.md."""

import pathlib

FOLDER = pathlib.Path(__file__).parent
DOCUMENTS = FOLDER / "elements.jsonl"
QUESTIONS = FOLDER / "elements_qa.jsonl"
SETTINGS = FOLDER / "elements.toml"
BANK = FOLDER / "bank"
