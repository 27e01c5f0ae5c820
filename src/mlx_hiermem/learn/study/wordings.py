"""Ways to ask for a fact, invented by a language model.

A small model cannot write a good question when it is told to, but it can do two things well: say a word in other
words, and go on with a pattern. So it first says what is asked for (the sentence's own words give one name for it,
the model another, and others that mean the same: of a height, "how high it is"). Then it is shown one pattern on
subjects of everyday knowledge, and continues it with the subject and each of those names. Nothing is believed:
`study` keeps the wordings by which the model, with the window before it, finds the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mlx_hiermem.learn.study.facts import SUBJECT, Fact, without
from mlx_hiermem.learn.study.teacher import Teacher

# What the examples are about, and what is asked for.
SHOWN = [
    ("penicillin", "code"),
    ("Mount Everest", "height"),
    ("Macbeth", "author"),
    ("the Danube", "length in km"),
    ("Marie Curie", "place where she was born"),
]
# A pattern's lines, and whether they are statements that the answer ends.
PATTERNS = [
    ([f"What is the {what} of {subject}?" for subject, what in SHOWN], False),
    ([f"I would like to know the {what} of {subject}." for subject, what in SHOWN], False),
    ([f"The {what} of {subject} is" for subject, what in SHOWN], True),
    (
        [
            "Under which code is penicillin listed?",
            "How high is Mount Everest?",
            "Who wrote Macbeth?",
            "How long is the Danube?",
            "Where was Marie Curie born?",
        ],
        False,
    ),
    ([f"Can you tell me the {what} of {subject}?" for subject, what in SHOWN], False),
    ([f"Which {what} does {subject} have?" for subject, what in SHOWN], False),
    ([f"{subject[0].upper()}{subject[1:]} has what {what}?" for subject, what in SHOWN], False),
    ([f"{subject[0].upper()}{subject[1:]} has the {what}" for subject, what in SHOWN], True),
    (
        [
            "In lists of medicines, penicillin has the code",
            "Among mountains, Mount Everest has the height",
            "Among plays, Macbeth has the author",
            "On the map, the Danube has the length in km",
            "Among physicists, Marie Curie has the place where she was born",
        ],
        True,
    ),
]
# The same the other way round: what is shown are subjects, what is said of them, and the value.
SHOWN_REVERSED = [
    ("penicillin", "code", "J01C"),
    ("Mount Everest", "height", "8,849 metres"),
    ("Macbeth", "author", "William Shakespeare"),
    ("the octopus", "number of arms", "8"),
    ("Marie Curie", "year of birth", "1867"),
]
REVERSED = [
    (
        [
            "Which medicine has the code J01C?",
            "Which mountain has the height 8,849 metres?",
            "Which play has the author William Shakespeare?",
            "Which animal has the number of arms 8?",
            "Which physicist has the year of birth 1867?",
        ],
        False,
    ),
    (
        [
            "The medicine with the code J01C is",
            "The mountain with the height 8,849 metres is",
            "The play with the author William Shakespeare is",
            "The animal with the number of arms 8 is",
            "The physicist with the year of birth 1867 is",
        ],
        True,
    ),
    (
        [
            "Which medicine is listed as J01C?",
            "Which mountain is 8,849 metres high?",
            "Which play was written by William Shakespeare?",
            "Which animal has 8 arms?",
            "Which physicist was born in 1867?",
        ],
        False,
    ),
    (
        [
            "J01C is the code of which medicine?",
            "8,849 metres is the height of which mountain?",
            "William Shakespeare is the author of which play?",
            "8 is the number of arms of which animal?",
            "1867 is the year of birth of which physicist?",
        ],
        False,
    ),
]
OWN, SYNONYM, RARE = range(len(PATTERNS)), range(5), range(0, 4, 3)  # by which patterns a name is asked for
OTHER_WORDS = (
    "The same in other words.\n\nheight: how high it is\nauthor: person who wrote it\nbirthplace: town where "
    "somebody was born\nprice: what it costs\nspouse: husband or wife\nvelocity: speed\nage: number of years\n"
    "boiling point: temperature at which it boils\n"
)
ASKED_FOR = "".join(
    f"Text: {text}\nAnswer: {answer}\nAsked for: {what}\n\n"
    for text, answer, what in [
        ("Penicillin is a medicine with the code J01C.", "J01C", "code"),
        ("Mount Everest. Its summit is 8,849 metres high.", "8,849", "height in metres"),
        ("Macbeth. Author: William Shakespeare", "William Shakespeare", "author"),
        ("Danube. It was described in 1726 by Marsigli.", "1726", "year of the description"),
        ("Marie Curie was born in Warsaw.", "Warsaw", "place of birth"),
    ]
)
SYNONYMS = 3  # tries besides the likeliest
LINE = 18  # tokens of a wording
# Words that name nothing.
_FUNCTION = """
    a an the of in on at by to for from with as and or is are was were be been has have had it its his her their
    this that which who about around approximately some called named into than but not also very
"""
_ASKING = (
    "what which who whom whose when where why how many much do does did can could you tell me i would like know"
)
FUNCTION, ASKING = frozenset(_FUNCTION.split()), frozenset(_ASKING.split())


@dataclass(frozen=True)
class Wording:
    """A question, or the beginning of a statement; SUBJECT stands where the subject is named."""

    text: str
    statement: bool
    what: str = field(default="", compare=False)  # is asked for

    def prompt(self, subject: str) -> str:
        text = self.text.replace(SUBJECT, subject)
        return text[:1].upper() + text[1:]


def own_words(fact: Fact) -> str:
    """What is asked for, in the sentence's words: those right before the answer. "" where there are none."""
    before = without(fact.subject, fact.sentence[: fact.start])
    words = re.findall(rf"[\w'’-]+|{SUBJECT}|[.;,()]", before)
    while words and (words[-1] in FUNCTION or words[-1] == SUBJECT):
        words.pop()
    name: list[str] = []
    while words and re.match(r"[^\W\d]", words[-1]) and words[-1].lower() not in FUNCTION and len(name) < 4:
        name.insert(0, words.pop())
    return " ".join(name).lower()


def own_beginning(fact: Fact) -> Wording:
    """The sentence up to its answer, with the subject before it where it comes later."""
    beginning = without(fact.subject, fact.sentence[: fact.start]).strip()
    if fact.subject and SUBJECT not in beginning:
        beginning = f"{SUBJECT}. {beginning}".strip()
    return Wording(beginning, statement=True)


def echo(fact: Fact) -> Wording:
    """A plain sentence with "what" for its last word: of "makes" a small model makes no question.

    Nothing has to be tried here. The words are the sentence's own.
    """
    return Wording(f"{own_beginning(fact).text} what?", statement=False)


def names_of(teacher: Teacher, groups: Sequence[Sequence[Fact]], synonyms: bool, seed: int) -> list[list[str]]:
    """What is asked for by each group of facts of one shape, in several words, with `synonyms` in others too."""
    facts = [fact for group in groups for fact in group]
    prompts = [f"Text: {fact.sentence}\nAnswer: {fact.answer}\nAsked for:" for fact in facts]
    said = dict(zip(facts, teacher.lines([(ASKED_FOR, prompt) for prompt in prompts], 8), strict=True))
    names = [_unique([own_words(group[0]), *(said[fact] for fact in group)], group[0]) for group in groups]
    for temperature, tries in ((0.0, 1), (0.8, SYNONYMS)) if synonyms else ():
        asked = [(i, own[0]) for i, own in enumerate(names) if own for _ in range(tries)]
        more = teacher.lines([(OTHER_WORDS, f"{name}:") for _, name in asked], 10, temperature, seed)
        for (i, _), name in zip(asked, more, strict=True):
            names[i] = _unique([*names[i], name], groups[i][0])
    return names


def _unique(names: Iterable[str], fact: Fact) -> list[str]:
    kept = dict.fromkeys(re.sub(r"^(?:the|an?) ", "", name.strip(" .,;:").lower()) for name in names)
    return [name for name in kept if name and fact.answer.lower() not in name.split()]


def wordings(
    teacher: Teacher,
    asked: Sequence[tuple[Fact, str, Sequence[int]]],
    tell: Callable[[float], None] = lambda share: None,
) -> list[list[Wording]]:
    """For each (fact, what is asked for, numbers of patterns) its wordings; `tell` is told the share done."""
    shown = [_shown([f"{subject}, {what}" for subject, what in SHOWN], lines) for lines, _ in PATTERNS]
    tasks = [
        _Task(i, shown[number], f"{fact.subject}, {what}:", PATTERNS[number][1])
        for i, (fact, what, numbers) in enumerate(asked)
        for number in numbers
    ]
    return _continued(teacher, [(fact, what) for fact, what, _ in asked], tasks, tell)


def reversed_wordings(
    teacher: Teacher, asked: Sequence[tuple[Fact, str]], tell: Callable[[float], None] = lambda share: None
) -> list[list[Wording]]:
    """For each (reversed fact, what its value is) its wordings, by all patterns."""
    shown = [_shown([", ".join(one) for one in SHOWN_REVERSED], lines) for lines, _ in REVERSED]
    tasks = [
        _Task(i, pattern, f"{fact.answer}, {what}, {fact.subject}:", statement)
        for i, (fact, what) in enumerate(asked)
        for pattern, (_, statement) in zip(shown, REVERSED, strict=True)
    ]
    return _continued(teacher, asked, tasks, tell)


@dataclass(frozen=True)
class _Task:
    """A pattern to go on with, for the fact of this number."""

    number: int
    shown: str
    prompt: str
    statement: bool


def _continued(
    teacher: Teacher,
    asked: Sequence[tuple[Fact, str]],
    tasks: Sequence[_Task],
    tell: Callable[[float], None],
) -> list[list[Wording]]:
    found: list[list[Wording]] = [[] for _ in asked]
    lines = teacher.lines([(task.shown, task.prompt) for task in tasks], LINE, tell=tell)
    for task, line in zip(tasks, lines, strict=True):
        fact, what = asked[task.number]
        wording = Wording(without(fact.subject, line), task.statement, what)
        if wording not in found[task.number] and _is_whole(wording, fact):
            found[task.number].append(wording)
    return found


def _shown(asked: Sequence[str], lines: Sequence[str]) -> str:
    """A pattern on the examples' subjects."""
    return "".join(f"{what}: {line}\n" for what, line in zip(asked, lines, strict=True))


def _is_whole(wording: Wording, fact: Fact) -> bool:
    """Names the subject once, asks for something of it, gives nothing away, no circles, ends as it should."""
    text = wording.text
    words = text.lower().split()
    phrases = list(zip(words, words[1:], words[2:], strict=False))
    gives_away = re.search(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", text, re.IGNORECASE)
    ends = text[-1:].isalpha() or text[-1:] == SUBJECT if wording.statement else text[-1:] in "?."
    asks = {word.lower() for word in re.findall(r"[^\W\d_]+", text.replace(SUBJECT, ""))} - FUNCTION - ASKING
    circles = len(set(phrases)) < len(phrases)  # a small model's "of the element of the element of"
    return text.count(SUBJECT) == 1 and bool(asks) and not (gives_away or circles) and ends
