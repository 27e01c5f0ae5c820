"""Many sequences, each with a memory of its own, in one decode step.

mlx-lm's BatchGenerator does the continuous batching: sequences join and leave between steps. Which memory a
sequence has travels with its KV cache, as one more entry of the list: whatever the generator does to the caches
(merge, filter, extend), it does to the rows of the memory table too. Prompts that begin like an earlier one under
the same memory take their keys and values from a prefix cache.

Not for use by several threads; only `bring`, which moves files, may run on another one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.cache import BlockCache, Fetch
from mlx_hiermem.config import GENERIC_NODE, Path
from mlx_hiermem.errors import ArgumentError, HierMemError
from mlx_hiermem.memory.attach import Attachment
from mlx_hiermem.memory.table import NOTHING, MemoryTable
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.response import GrowingText, Response
from mlx_hiermem.sampling import Sampling
from mlx_hiermem.selection import Selection

REMEMBERED_PROMPTS = 64  # prefixes kept at most, within the byte budget


@dataclass(frozen=True)
class Token:
    """One token of one sequence; `finish_reason` is stop (the end of the text) or length."""

    uid: int
    token: int
    finish_reason: str | None = None
    logprob: float = 0.0  # where Sampling asks for it
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), likeliest first


@dataclass
class _Sequence:
    """What is known of a sequence in flight."""

    blocks: tuple[str, ...]  # its memory: the bank and its blocks
    key: tuple[str, ...]  # of its prefix in the cache
    sampling: Sampling
    cached: int  # tokens of its prompt that came from the prefix cache


class _Growing:
    """A reply of `MemoryBatch.replies` while it grows: as mlx-lm's own generation words it."""

    def __init__(self, number: int, prompt: int, selection: Selection, sampling: Sampling, tokenizer: Any) -> None:
        self.number, self._prompt, self._selection = number, prompt, selection
        self._text, self._detokenizer = GrowingText(tuple(sampling.stop)), tokenizer.detokenizer
        self._begun, self._generated = 0.0, 0

    def add(self, token: Token) -> Response | None:
        """The response where this token ends it."""
        self._begun = self._begun or time.perf_counter()
        self._generated += 1
        if token.finish_reason != "stop":
            self._detokenizer.add_token(token.token)
        if token.finish_reason:
            self._detokenizer.finalize()
        self._text.add(self._detokenizer.last_segment, last=token.finish_reason is not None)
        reason = "stop" if self._text.stopped else token.finish_reason
        if reason is None:
            return None
        speed = self._generated / max(time.perf_counter() - self._begun, 1e-9)
        return Response(self._text.text, reason, self._selection, self._prompt, self._generated, speed)


class BatchedModel(Protocol):
    """What a batch needs of a `MemoryModel`."""

    @property
    def anchor(self) -> nn.Module: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def bank(self) -> MemoryBank | None: ...
    @property
    def cache(self) -> BlockCache | None: ...
    @property
    def attachment(self) -> Attachment | None: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def context(self) -> int | None: ...
    def fetch(self, chosen: Selection) -> Fetch | None: ...


class MemoryBatch:
    """`add` sequences whenever there is `room`, and `step` while there are any."""

    def __init__(self, model: BatchedModel, max_sequences: int = 8, prefix_cache_bytes: int = 512 << 20) -> None:
        """`model` is the default of `add`; others must have the same anchor in memory (`MemoryModel.beside`)."""
        if not isinstance(max_sequences, int) or max_sequences < 1:
            raise ArgumentError(f"max_sequences is {max_sequences!r}", "It is a whole number, 1 or more.")
        self.model, self.max_sequences = model, max_sequences
        self.prefixes = LRUPromptCache(REMEMBERED_PROMPTS, prefix_cache_bytes)
        self._anchor = _Batched(model)
        stop = [[token] for token in model.tokenizer.eos_token_ids] if model.tokenizer else None
        self._generator = BatchGenerator(
            self._anchor,
            stop_tokens=stop,
            completion_batch_size=max_sequences,
            prefill_batch_size=max_sequences,
        )
        self._sequences: dict[int, _Sequence] = {}

    def __len__(self) -> int:
        """Sequences in flight."""
        return len(self._sequences)

    @property
    def table(self) -> MemoryTable | None:
        """The memories that are attached now; None until a model with a bank is added to."""
        return self._anchor.table

    @property
    def room(self) -> bool:
        return len(self) < self.max_sequences

    def missing(self, chosen: Selection, model: BatchedModel | None = None) -> list[Path]:
        """The nodes whose blocks are wanted and still on the hub."""
        model = model or self.model
        bank = model.bank
        if bank is None or bank.remote is None or not chosen.memory.has_blocks:
            return []
        nodes = [GENERIC_NODE] if chosen.memory == MemoryChoice.GENERIC else bank.nodes_on(chosen.path)
        cached = model.cache
        return [n for n in nodes if not (cached and n in cached) and not (bank.root / block_name(n)).is_file()]

    def bring(self, chosen: Selection, model: BatchedModel | None = None) -> None:
        """Downloads what is `missing`. Raises HubError."""
        model = model or self.model
        remote = model.bank.remote if model.bank else None
        if remote:
            for node in self.missing(chosen, model):
                remote.bring(node, block_name(node))

    def add(
        self, tokens: list[int], chosen: Selection, sampling: Sampling, model: BatchedModel | None = None
    ) -> tuple[int, Selection]:
        """Fetches the memory chosen and queues a prompt with it; returns the sequence's id, and what was fetched.

        The memory is of `model`'s bank: banks of one anchor can be in one batch.
        Raises HierMemError where the prompt is empty, or does not fit the model's context with its reply.
        """
        if not self.room:
            raise HierMemError(f"the batch has its {self.max_sequences} sequences", "Wait until one has ended.")
        self._check(tokens, sampling)
        model = model or self.model
        if self.table is None and model.attachment is not None:
            self._anchor.table = MemoryTable(model.attachment)
        start = time.perf_counter()
        fetch = model.fetch(chosen)
        fetched = time.perf_counter()
        # Another bank, or this one after an edit, may have other weights under the same names.
        blocks = (model.bank.key, *fetch.blocks) if fetch and fetch.memory and model.bank else ()
        row = self.table.hold(blocks, fetch.memory if fetch else None) if self.table is not None else NOTHING
        done = time.perf_counter()
        selection = chosen.attached(fetch, (fetched - start) * 1e3, (done - fetched) * 1e3)
        key = (chosen.memory, *blocks) if chosen.memory.has_passage else blocks
        cache, rest = self.prefixes.fetch_nearest_cache(key, tokens)
        if cache is None or not rest:  # the last token is always computed
            cache, rest = make_prompt_cache(self.model.anchor), tokens
        prefix = tokens[: len(tokens) - len(rest)]
        uid = self._generator.insert(
            [rest],
            max_tokens=[sampling.max_tokens],
            caches=[[*cache, _Rows(mx.array([row]))]],
            all_tokens=[list(prefix)],
            samplers=[sampling.draw()],
            logits_processors=[sampling.processors()],
        )[0]
        self._sequences[uid] = _Sequence(blocks, key, sampling, len(prefix))
        return uid, selection

    def cached_tokens(self, uid: int) -> int:
        """Tokens of a sequence's prompt that were not computed again."""
        return self._sequences[uid].cached

    def step(self) -> list[Token]:
        """One more token of every sequence whose prompt is done, and a piece of the prompts that are not."""
        if not self._sequences:
            return []
        _, responses = self._generator.next()
        return [self._token(response) for response in responses]

    def replies(
        self, prompts: Sequence[list[int]], chosen: Sequence[Selection], sampling: Sampling
    ) -> list[Response]:
        """The whole replies to several prompts, in their order. The batch is closed then."""
        for tokens in prompts:
            self._check(tokens, sampling.fitted(len(tokens), self.model.context))
        waiting = iter(enumerate(zip(prompts, chosen, strict=True)))
        growing, found = dict[int, _Growing](), dict[int, Response]()
        try:
            while len(found) < len(prompts):
                while self.room and (following := next(waiting, None)) is not None:
                    number, (tokens, memory) = following
                    uid, selection = self.add(tokens, memory, sampling.fitted(len(tokens), self.model.context))
                    growing[uid] = _Growing(number, len(tokens), selection, sampling, self.model.tokenizer)
                for token in self.step():
                    if (response := growing[token.uid].add(token)) is not None:
                        self.remove(token.uid)
                        found[growing.pop(token.uid).number] = response
        finally:
            self.close()
        return [found[number] for number in range(len(prompts))]

    def remove(self, uid: int) -> None:
        """Takes a sequence out, finished or not."""
        if uid in self._sequences:
            self._generator.remove([uid])
            self._forget(uid)

    def forget(self) -> None:
        """Lets go of what is kept for prompts to come: of a bank that was edited, some may not be used any more."""
        self.prefixes.trim_to(n_sequences=0)
        if self.table is not None:
            self.table.forget()

    def close(self) -> None:
        for uid in list(self._sequences):
            self.remove(uid)
        self._generator.close()

    def _check(self, tokens: list[int], sampling: Sampling) -> None:
        if not tokens:
            raise HierMemError("the prompt is empty")
        if sampling.kv_bits:
            raise ArgumentError("mlx-lm cannot batch quantised KV caches", "Leave kv_bits out, or `generate`.")
        sampling.check_tokens(self.model.vocabulary)
        sampling.check_room(len(tokens), self.model.context)

    def _token(self, response: Any) -> Token:
        sampling = self._sequences[response.uid].sampling
        if response.finish_reason:
            self._remember(response)
            self._forget(response.uid)
        if not sampling.logprobs:
            return Token(response.uid, response.token, response.finish_reason)
        values = np.asarray(response.logprobs.astype(mx.float32))  # [V], computed already
        best = np.argsort(-values)[: sampling.top_logprobs]
        top = tuple((int(token), float(values[token])) for token in best)
        return Token(response.uid, response.token, response.finish_reason, float(values[response.token]), top)

    def _remember(self, response: Any) -> None:
        """Keeps a finished sequence's keys and values for prompts that go on from it."""
        *cache, _ = response.prompt_cache
        mx.eval([entry.state for entry in cache])
        self.prefixes.insert_cache(self._sequences[response.uid].key, response.all_tokens, cache)

    def _forget(self, uid: int) -> None:
        sequence = self._sequences.pop(uid)
        if self.table is not None:
            self.table.drop(sequence.blocks)


class _Batched:
    """The anchor as BatchGenerator calls it: it takes the rows off the caches and attaches them."""

    def __init__(self, model: BatchedModel) -> None:
        self.anchor = model.anchor
        self.table = MemoryTable(model.attachment) if model.attachment else None
        self.real_vocabulary = model.config.get("effective_vocab_size")

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """tokens [B, T] -> logits [B, T, V]; ids that a padded vocabulary does not use get none."""
        *cache, rows = cache
        if self.table is not None:
            self.table.use(rows.rows)
        logits = self.anchor(tokens, cache=cache)
        if self.real_vocabulary:
            logits = mx.where(mx.arange(logits.shape[-1]) < self.real_vocabulary, logits, -mx.inf)
        return logits


@dataclass
class _Rows:
    """The memory table's row of each sequence [B], with the methods that the generator calls on a KV cache."""

    rows: mx.array = field(default_factory=lambda: mx.zeros((0,), mx.int32))

    @property
    def state(self) -> mx.array:
        return self.rows

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @classmethod
    def merge(cls, caches: Sequence[_Rows]) -> _Rows:
        return cls(mx.concatenate([cache.rows for cache in caches]))

    def extend(self, other: _Rows) -> None:
        self.rows = mx.concatenate([self.rows, other.rows])

    def filter(self, keep: Sequence[int]) -> None:
        self.rows = self.rows[mx.array(list(keep))]

    def extract(self, index: int) -> _Rows:
        return _Rows(self.rows[index : index + 1])

    def prepare(self, **padding: Any) -> None:
        """Rows have no positions to pad."""

    def finalize(self) -> None:
        """Nor any to move."""
