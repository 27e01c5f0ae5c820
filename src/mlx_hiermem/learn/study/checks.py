"""What a teacher wrote is checked against the window that it read: numbers and names must stand there.

A language model adds what it knows, or believes, of a subject. Numbers and names are where that shows, and where it
harms: a record with a number or a name that the window and its title do not have is dropped. Words may be inflected
(a window about Spain supports "Spanish"), and small numbers written out.

A reply is also checked as a whole. Where most of its words are neither the window's nor words that any text is made
of, it is about something else, or in another language.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

from mlx_hiermem.learn.settings import Prompt
from mlx_hiermem.learn.study.patterns import patterns

NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")
WORD = re.compile(r"[^\W\d_]+")
# Where a sentence may begin, so that a capital need not mean a name.
BEGINS = re.compile(r"(?:^|[.!?:;…]|\n)[\s\"'“‘(\[*-]*")
SHORT = 6  # words, up to which an answer's first word is taken for a name where it has a capital
OWN = 0.45  # share of a reply's words that must be the window's; of a right one 0.67 or more, of a French one 0.2
COUNTED = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
COUNTED += "seventeen eighteen nineteen twenty"
WRITTEN = {word: str(number) for number, word in enumerate(COUNTED.split())}
WRITTEN |= {"half": "2", "hundred": "100", "thousand": "1000"}


class Evidence:
    """What a window and its title say, as far as it is compared."""

    def __init__(self, title: str, text: str) -> None:
        said = _plain(f"{title}. {text}")
        self.words = {word.casefold() for word in WORD.findall(said)}
        self._numbers = {_digits(number) for number in NUMBER.findall(said)}
        self._numbers |= {number for word, number in WRITTEN.items() if word in self.words}

    def supports(self, one: Prompt) -> bool:
        """Whether all numbers and names of a record stand there."""
        prompt, answer = _plain(one.prompt), _plain(one.answer)
        parts = [prompt, answer] if one.framed or one.chat else [f"{prompt}{answer}"]  # a statement is one sentence
        numbers = (number for part in parts for number in NUMBER.findall(part))
        names = [name for part in parts for name in _names(part)]
        if one.framed and len(answer.split()) <= SHORT:
            names += [word for word in WORD.findall(answer)[:1] if word[0].isupper() and not _opens(word)]
        return all(_digits(number) in self._numbers for number in numbers) and all(map(self._has, names))

    def covers(self, records: Iterable[Prompt]) -> bool:
        """Whether most words of a reply are from there, or such as any text is made of."""
        text = _plain(" ".join(f"{one.prompt} {one.answer}" for one in records))
        words = [word.casefold() for word in WORD.findall(text)]
        known = patterns().function_words | patterns().asking_words
        return sum(word in self.words or word in known for word in words) >= OWN * len(words)

    def _has(self, name: str) -> bool:
        """Whether a word is there, or one that begins like it."""
        name = name.casefold()
        beginning = name[: max(4, len(name) - 3)]
        return name in self.words or (len(name) > 4 and any(word.startswith(beginning) for word in self.words))


def same_words(text: str) -> str:
    """A text by which repetitions are known: its words and numbers, in small letters."""
    return " ".join(re.findall(r"\w+", _plain(text).casefold()))


def _names(text: str) -> Iterator[str]:
    """Words in capitals that do not begin a sentence."""
    begins = {match.end() for match in BEGINS.finditer(text)}
    for match in WORD.finditer(text):
        word = match[0]
        if word[0].isupper() and len(word) > 1 and match.start() not in begins:
            yield word


def _opens(word: str) -> bool:
    """Whether a word begins sentences and names nothing."""
    small = {"yes", "no"} | patterns().function_words
    return word.casefold() in small or patterns().openers.fullmatch(word) is not None


def _plain(text: str) -> str:
    """A text without accents, which people leave out."""
    return "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))


def _digits(number: str) -> str:
    return number.replace(",", "")
