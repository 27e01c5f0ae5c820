"""How a text continues: how its tokens are drawn, how many there are at most, and which strings end it.

Also in how many bits its KV cache is kept, which changes the text a little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_frequency_penalty,
    make_logits_processors,
    make_presence_penalty,
    make_repetition_penalty,
)

from mlx_hiermem.errors import AnchorError, ArgumentError, HierMemError
from mlx_hiermem.grammar import Grammar

BOUNDS: dict[str, tuple[Any, float, float]] = {
    "max_tokens": (int, 1, math.inf),
    "temperature": (int | float, 0, math.inf),
    "top_p": (int | float, 0, 1),
    "top_k": (int, 0, math.inf),
    "min_p": (int | float, 0, 1),
    "repetition_penalty": (int | float, 0, math.inf),
    "presence_penalty": (int | float, -math.inf, math.inf),
    "frequency_penalty": (int | float, -math.inf, math.inf),
    "seed": (int, 0, 2**64 - 1),
    "quantized_kv_start": (int, 0, math.inf),
}
WITHOUT = "Leave kv_bits out."
CHOICES: dict[str, tuple[int | None, ...]] = {"kv_bits": (None, 4, 8), "kv_group_size": (32, 64, 128)}

Sampler = Callable[[mx.array], mx.array]  # logprobs [B, V] -> tokens [B]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # tokens so far, logits [1, V] -> logits


class Options(TypedDict, total=False):
    """The keyword options of everything that generates. They mean what they mean in mlx-lm."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    sampler: Sampler | None
    logits_processors: Sequence[LogitsProcessor]
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int


@dataclass(frozen=True)
class Sampling:
    """How one sequence continues. Raises ArgumentError for what cannot be."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # 0 or 1: any token
    top_k: int = 0  # 0: any token
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # 1: none
    presence_penalty: float = 0.0  # taken from the logits of tokens that the reply has already
    frequency_penalty: float = 0.0  # the same, as often as the reply has them
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token -> what is added to its logit
    seed: int | None = None  # the same seed gives the same text, whoever else is in the batch
    stop: str | Sequence[str] = ()  # strings that end the text, and are not part of it
    sampler: Sampler | None = None  # in place of temperature, top_p, top_k, min_p and seed
    logits_processors: Sequence[LogitsProcessor] = ()
    grammar: Grammar | None = None  # what the reply may be
    logprobs: bool = False
    top_logprobs: int = 0  # how many of the likeliest tokens each Token reports
    kv_bits: int | None = None  # of the KV cache's numbers, 4 or 8; None: those that the anchor computes with
    kv_group_size: int = 64  # numbers that share a scale and an offset
    quantized_kv_start: int = 5000  # tokens in the cache before it is quantised

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        for name, (kind, least, most) in BOUNDS.items():
            value = getattr(self, name)
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not (number and least <= value <= most) and not (name == "seed" and value is None):
                bounds = f", between {least} and {most}" if most < math.inf else f", {least} or more"
                what = "a whole number" if kind is int else "a number"
                raise ArgumentError(f"{name} is {value!r}", f"It is {what}{bounds if least > -math.inf else ''}.")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if type(value) not in (int, type(None)) or value not in choices:
                numbers = ", ".join(str(choice) for choice in choices if choice)
                raise ArgumentError(f"{name} is {value!r}", f"It is one of {numbers}.")
        for token, bias in dict(self.logit_bias).items():
            if type(token) is not int or not isinstance(bias, int | float) or math.isnan(bias):
                raise ArgumentError(f"logit_bias has {token!r}: {bias!r}", "It is a number for each token id.")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ArgumentError(f"stop is {self.stop!r}", "It is a text or several, none of them empty.")
        for function in (self.sampler, *self.logits_processors):
            if function is not None and not callable(function):
                raise ArgumentError(f"{function!r} is not a function", "mlx_lm.sample_utils makes such functions.")

    @classmethod
    def of(cls, options: Mapping[str, Any], **defaults: Any) -> Sampling:
        """Of a caller's keyword options. Raises ArgumentError for one that there is not."""
        unknown = options.keys() - Options.__annotations__.keys()
        if unknown:
            known = ", ".join(Options.__annotations__)
            raise ArgumentError(f"there is no option {min(unknown)}", f"There are {known}.")
        try:
            return cls(**{**defaults, **options})
        except TypeError as error:  # what has no items where several are wanted
            raise ArgumentError(f"an option is of the wrong type: {error}") from error

    def check_tokens(self, vocabulary: int) -> None:
        """Raises ArgumentError where `logit_bias` names a token that the model does not have."""
        for token in self.logit_bias:
            if not 0 <= token < vocabulary:
                raise ArgumentError(f"logit_bias has token {token}", f"The model's end at {vocabulary - 1}.")

    def check_cache(self, anchor: nn.Module) -> None:
        """Raises AnchorError where the anchor's KV cache is to be quantised and cannot be."""
        if self.kv_bits:
            check_quantizable(anchor, self.kv_bits, self.kv_group_size)

    def draw(self) -> Sampler | None:
        """Draws tokens; None takes the likeliest, which one call does for all sequences of a batch."""
        if self.sampler is not None or self.temperature == 0:
            return self.sampler
        key = None if self.seed is None else mx.random.key(self.seed)

        def sample(logprobs: mx.array) -> mx.array:
            nonlocal key
            now = None  # MLX's own state, see mx.random.seed
            if key is not None:
                key, now = mx.random.split(key)
            if 0 < self.top_p < 1:
                logprobs = apply_top_p(logprobs, self.top_p)
            if self.min_p > 0:
                logprobs = apply_min_p(logprobs, self.min_p)
            if 0 < self.top_k < logprobs.shape[-1]:
                logprobs = apply_top_k(logprobs, self.top_k)
            return mx.random.categorical(logprobs / self.temperature, key=now)

        return sample

    def fitted(self, prompt: int, context: int | None) -> Sampling:
        """With a reply that fits the model's context. Raises HierMemError where there is no room for one."""
        fitted = replace(self, max_tokens=max(min(self.max_tokens, context - prompt), 1)) if context else self
        fitted.check_room(prompt, context)
        return fitted

    def check_room(self, prompt: int, context: int | None) -> None:
        """Raises HierMemError where a prompt of so many tokens and the reply are more than the model's context."""
        if context and prompt + self.max_tokens > context:
            raise HierMemError(
                f"the prompt's {prompt} tokens and a reply of {self.max_tokens} are more than the "
                f"model's {context}",
                "Ask a shorter question, or for a shorter reply.",
            )

    def processors(self) -> list[LogitsProcessor]:
        """What changes the logits before a token is drawn."""
        found = list(make_logits_processors(logit_bias=dict(self.logit_bias) or None))
        if self.repetition_penalty not in (0, 1):
            found.append(make_repetition_penalty(self.repetition_penalty))
        if self.presence_penalty:
            found.append(_of_the_reply(make_presence_penalty(self.presence_penalty, self.max_tokens)))
        if self.frequency_penalty:
            found.append(_of_the_reply(make_frequency_penalty(self.frequency_penalty, self.max_tokens)))
        last = [self.grammar.processor()] if self.grammar else []  # so that nothing can allow what it forbids
        return [*found, *self.logits_processors, *last]


def _of_the_reply(penalty: LogitsProcessor) -> LogitsProcessor:
    """Shows it the reply's tokens alone, as OpenAI counts them; the first call is at the prompt's end."""
    prompt: int | None = None

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal prompt
        prompt = len(tokens) if prompt is None else prompt
        return penalty(tokens[prompt:], logits)

    return process


def behind(before: Sequence[int], processor: LogitsProcessor) -> LogitsProcessor:
    """Shows it tokens that are in the KV cache already in front of those that mlx-lm knows of."""
    if not before:
        return processor
    first = mx.array(list(before), mx.int32)
    return lambda tokens, logits: processor(mx.concatenate([first, tokens.astype(mx.int32)]), logits)


def real_ids(count: int | None) -> list[LogitsProcessor]:
    """What keeps a padded vocabulary's unused ids, from `count` on, from being drawn; None: it has none."""
    return [lambda _, logits: mx.where(mx.arange(logits.shape[-1]) < count, logits, -mx.inf)] if count else []


# A KV cache in few bits


def check_quantizable(anchor: nn.Module, bits: int, group_size: int) -> None:
    """Raises AnchorError where an anchor cannot go on from a KV cache in few bits, mlx-lm's `kv_bits`.

    mlx-lm does not look before it begins. An anchor whose layers keep a window or a state of another kind, whose
    attention knows plain keys alone, or whose heads have a width that no group fits, would fail in the midst of a
    reply. MLX checks shapes as it builds a graph; nothing is computed.
    """
    cache = make_prompt_cache(anchor)
    if others := {type(entry).__name__ for entry in cache if type(entry) is not KVCache}:
        raise _refusal(f"mlx-lm can do that with no {' or '.join(sorted(others))}", WITHOUT)
    quantized = [entry.to_quantized(group_size, bits) for entry in cache]
    try:
        for count in (2, 1):  # a prompt, and a token after it
            anchor(mx.zeros((1, count), mx.int32), cache=quantized)
    except (AttributeError, TypeError) as error:  # it takes the keys for one array; they are three
        name = type(anchor).__module__.rpartition(".")[2]
        raise _refusal(f"mlx-lm's attention of {name} takes no such keys", WITHOUT) from error
    except ValueError as error:
        raise _refusal(str(error), "Try another kv_group_size (32, 64, 128), or leave kv_bits out.") from error


def _refusal(reason: str, hint: str) -> AnchorError:
    return AnchorError(f"this anchor's KV cache cannot be quantised: {reason}", hint)
