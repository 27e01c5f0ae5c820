"""How far a text is forgotten: what was learnt of it is asked for, before and after.

A text counts as said where each of its tokens is the likeliest after those before it, so that greedy decoding says
it word for word. Its loss, in nats a token, tells more: without any memory it is the anchor's own, and a model that
has forgotten comes near to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hiermem.learn.record import LearntFile
from mlx_hiermem.learn.train.dataset import IN_CHAT, TrainingExample, TrainingSet
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.progress import Progress, unheard

NONE, FETCHED = "none", "fetched"


@dataclass(frozen=True)
class Probe:
    """A prompt and its answer, or a text as it stands (`prompt` is empty), that were learnt of a document."""

    document: str
    prompt: str
    answer: str
    tokens: tuple[int, ...]
    first: int  # of the tokens that were learnt

    @property
    def asked(self) -> str:
        """By which it is routed."""
        return self.prompt or self.answer


@dataclass(frozen=True)
class Recall:
    """What is known of one probe."""

    said: bool
    loss: float


def probes_of(kept: TrainingSet, files: Iterable[LearntFile], tokenizer: Any, most: int) -> list[Probe]:
    """Up to `most` probes of each file: questions, or texts where none was learnt."""
    return [probe for file in files for probe in _of_file(kept, file, tokenizer, most)]


def _of_file(kept: TrainingSet, file: LearntFile, tokenizer: Any, most: int) -> list[Probe]:
    special = set(tokenizer.all_special_ids)
    texts, questions = list[Probe](), list[Probe]()
    for number in np.flatnonzero(np.isin(kept.windows, file.windows)).tolist():
        example = kept.read(number)
        first = int(example.learn.argmax())
        if first <= 1:
            texts.append(_probe(file.name, example, 0, tokenizer))
        elif example.form != IN_CHAT and not special & set(example.tokens[1:first].tolist()):  # one form is enough
            questions.append(_probe(file.name, example, first, tokenizer))
    found = questions or texts
    return [found[len(found) * i // most] for i in range(most)] if len(found) > most else found


def _probe(document: str, example: TrainingExample, first: int, tokenizer: Any) -> Probe:
    tokens = tuple(example.tokens.tolist())
    prompt, answer = (
        tokenizer.decode(list(part), skip_special_tokens=True).strip() for part in (tokens[:first], tokens[first:])
    )
    return Probe(document, prompt, answer, tokens, max(first, 1))


def memories_of(model: MemoryModel, probes: Sequence[Probe]) -> list[str]:
    """The path that each probe takes.

    The blocks are asked by it afterwards too: the bank may then have nothing like the probe any more, and would
    answer without them.
    """
    return [str(model.choose(FETCHED, probe.asked).path) or FETCHED for probe in probes]


def recall(
    model: MemoryModel, probes: Sequence[Probe], memories: Sequence[str], progress: Progress = unheard
) -> list[Recall]:
    """What a model knows of the probes, each with its memory."""
    found = []
    for probe, memory in zip(probes, memories, strict=True):
        model.select(memory, probe.asked)
        tokens = mx.array(probe.tokens)[None]
        logits = model.anchor(tokens[:, :-1])[0, probe.first - 1 :].astype(mx.float32)
        wanted = tokens[0, probe.first :]
        loss = nn.losses.cross_entropy(logits, wanted).mean()
        said = (logits.argmax(-1) == wanted).all()
        found.append(Recall(bool(said.item()), round(float(loss.item()), 4)))
        progress(len(found), len(probes))
    return found


def forgotten_lines(probes: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(document, what is left of it), of a receipt's rows: `4 asked, 4 said word for word, now 0; loss 0.02, …`."""
    for document, rows in itertools.groupby(probes, key=lambda row: row["document"]):
        some = list(rows)
        said = {when: sum(row[when]["said"] for row in some) for when in ("before", "after")}
        loss = {when: np.mean([row[when]["loss"] for row in some]) for when in ("before", "after", "without")}
        yield (
            document,
            f"{len(some)} asked, {said['before']} said word for word, now {said['after']}; "
            f"loss {loss['before']:.2f}, now {loss['after']:.2f}, without memory {loss['without']:.2f}",
        )
