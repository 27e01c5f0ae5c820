"""Twenty short texts on which exported anchors are measured: facts, stories, code, questions, other languages.

Up to the bar a text is a prompt to go on from; the whole of it, without the bar, is what logits are compared on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TEXTS = (
    "The atomic number of neon is| 10, and its symbol is Ne. It is a noble gas that hardly reacts with anything.",
    "What is the chemical symbol of tungsten?| The symbol of tungsten is W, from its older name wolfram.",
    "Gold belongs to period 6| of the periodic table. Its melting point is about 1064 degrees Celsius.",
    "Uranium was discovered by| Martin Klaproth in 1789, who named it after the planet Uranus.",
    "Once upon a time there was a girl who lived| in a village near the forest, and everyone loved her.",
    "The capital of France is| Paris, a city on the Seine with more than two million people.",
    "def add(a, b):\n    return| a + b\n\nprint(add(2, 3))  # prints 5\n",
    "for i in range(10):\n    if i % 2 == 0:\n|        print(i, 'is even')\n    else:\n        continue\n",
    "Water boils at| 100 degrees Celsius at sea level, and at lower temperatures high in the mountains.",
    "To make bread you need| flour, water, salt and yeast. Knead the dough and let it rise for an hour.",
    "Dear Sir or Madam, I am writing to| complain about the service I received in your shop last week.",
    "Der schnelle braune Fuchs| springt über den faulen Hund, und der Hund schläft weiter.",
    "La bibliothèque est ouverte| du lundi au vendredi, de neuf heures à dix-huit heures.",
    "The three laws of motion were| published by Isaac Newton in 1687, in his Principia.",
    "12 + 7 = 19, 15 + 8 =| 23, 21 + 9 = 30, 34 + 6 = 40, 51 + 12 = 63",
    "She opened the letter, read it twice, and| then put it into the fire without saying a word.",
    "The heart pumps blood through| the body. Arteries carry it away, and veins bring it back.",
    '{"name": "Ada", "born": 1815,| "field": "mathematics", "languages": ["English", "French"]}',
    "In 1969 the first people| walked on the Moon. Six hundred million watched it on television.",
    "If it rains tomorrow, we will| stay at home, light a fire, and play cards until the evening.",
)


def token_ids(tokenizer: Any, vocabulary: int, longest: int) -> list[np.ndarray]:
    """Ids [T] of each text, at most `longest`; without a tokenizer, steps of a prime through the vocabulary."""
    if tokenizer is None:
        return [np.arange(start, start + min(24, longest)) * 7919 % vocabulary for start in range(len(TEXTS))]
    texts = (text.replace("|", "") for text in TEXTS)
    return [np.array(tokenizer.encode(text)[:longest]) for text in texts]


def prompts() -> list[str]:
    """What each text begins with."""
    return [text.partition("|")[0] for text in TEXTS]
