"""MemoryModel: an anchor, a bank and a router that together answer.

    model = load("my-model")
    model.generate("The atomic number of neon is")                   # routed, fetched, attached
    for piece in model.stream("…", memory="none"): ...

For each prompt the router picks a path, the cache brings its blocks, and the attachment fills the slots.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.anchor import identify, load_anchor
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError, BankError, HierMemError
from mlx_hiermem.memory.attach import Attachment, attach
from mlx_hiermem.share.resolve import resolve

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from mlx_hiermem.router import Routed, Router

MODES = ("none", "generic", "fetched")
ROOT = Path()


@dataclass(frozen=True)
class Selection:
    """Which memory is attached, and what selecting it took."""

    memory: str  # none, generic, fetched, or the path that was asked for
    path: Path = ROOT
    labels: tuple[str, ...] = ()  # of the path's nodes
    distances: tuple[float, ...] = ()  # to the chosen centroids, per level
    blocks: tuple[str, ...] = ()  # what is attached: equal blocks mean equal weights
    memory_bytes: int = 0
    bytes_read: int = 0  # from disk
    route_ms: float = 0.0
    fetch_ms: float = 0.0
    attach_ms: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


class MemoryModel:
    """Not safe for use by several threads at once: one memory is attached at a time."""

    def __init__(
        self,
        anchor: nn.Module,
        tokenizer: Any,
        config: dict[str, Any],
        bank: MemoryBank | None = None,
        router: Router | None = None,
        cache_bytes: int = 512 << 20,
    ) -> None:
        self.anchor, self.tokenizer, self.config, self.bank = anchor, tokenizer, config, bank
        self.cache = BlockCache(bank, cache_bytes) if bank else None
        self._router = router
        self._attachment: Attachment | None = attach(anchor, bank.config) if bank else None
        self.selection = Selection("none")
        self.last: GenerationResponse | None = None  # figures of the last piece generated

    @property
    def router(self) -> Router:
        """Loads the sentence embedder when a text is first routed."""
        if self.bank is None:
            raise BankError("this model has no bank", "Use memory none, or convert or learn a bank for it.")
        if self._router is None:
            from mlx_hiermem.router import Router

            self._router = Router.of_bank(self.bank)
        return self._router

    def select(
        self, memory: str, text: str, blocked: Collection[Path] = (), routed: Routed | None = None
    ) -> Selection:
        """Attaches a memory: `none`, `generic`, `fetched` (routed by `text`), or a path such as `10.7`.

        `blocked` nodes are closed beside those of the bank's policy; naming a path through one is a BankError.
        With `routed`, fetched is the path that the caller has already found.
        """
        path, route_ms = ROOT, 0.0
        distances: tuple[float, ...] = ()
        if memory == "fetched":
            routed = routed or self.router.route(text, blocked)
            path, distances, route_ms = routed.path, routed.distances, routed.milliseconds
        elif memory not in MODES:
            path = self._named_path(memory, blocked)
        start = time.perf_counter()
        if memory == "none":
            fetch = None
        elif self.cache is None:
            raise BankError("this model has no bank", "Use memory none, or convert or learn a bank for it.")
        else:
            fetch = self.cache.fetch_generic() if memory == "generic" else self.cache.fetch(path)
        fetched = time.perf_counter()
        fetched_memory = fetch.memory if fetch else None
        if self._attachment is not None:
            self._attachment.set(fetched_memory)
        done = time.perf_counter()
        self.selection = Selection(
            memory=memory,
            path=path,
            labels=tuple(self.bank.manifest.label(node) for node in path.prefixes()) if self.bank else (),
            distances=distances,
            blocks=tuple(str(node) or "generic" for node in fetch.nodes) if fetch else (),
            memory_bytes=fetched_memory.nbytes if fetched_memory else 0,
            bytes_read=fetch.bytes_read if fetch else 0,
            route_ms=route_ms,
            fetch_ms=(fetched - start) * 1e3,
            attach_ms=(done - fetched) * 1e3,
        )
        return self.selection

    def _named_path(self, memory: str, blocked: Collection[Path]) -> Path:
        try:
            path = Path.parse(memory)
        except HierMemError as error:
            raise HierMemError(f"unknown memory '{memory}'", f"Use {', '.join(MODES)} or a path.") from error
        if self.bank is not None:
            self.bank.tree.check([path])
            closed = self.bank.policy.block(blocked).blocker(path)
            if closed is not None:
                raise BankError(f"the memory {path} is blocked (at {closed})", "Take another path, or unblock it.")
        return path

    def stream(
        self,
        prompt: str,
        *,
        memory: str | None = None,
        chat: bool = False,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """Yields the continuation's text piece by piece; `self.selection` and `self.last` have the figures.

        `memory` defaults to fetched where the model has a bank. `chat` wraps the prompt in the chat template;
        the route is computed from the prompt alone either way.
        """
        self.select(memory or ("fetched" if self.bank else "none"), prompt)
        tokens = self.chat_tokens([{"role": "user", "content": prompt}]) if chat else self.tokens(prompt)
        for response in self.responses(tokens, max_tokens, temperature, top_p):
            yield response.text

    def generate(self, prompt: str, **options: Any) -> str:
        """The whole continuation; options as for `stream`."""
        return "".join(self.stream(prompt, **options))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the tokenizer's own special tokens."""
        if self.tokenizer is None:
            raise AnchorError("this anchor has no tokenizer", "Convert it again with --tokenizer.")
        return list(self.tokenizer.encode(text))

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the anchor's chat template, ready for the assistant's reply."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise AnchorError("this anchor has no chat template", "Use `hiermem generate` with a plain prompt.")
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True))

    def responses(
        self,
        tokens: list[int],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        prompt_cache: list[Any] | None = None,
    ) -> Iterator[GenerationResponse]:
        """mlx-lm's generation with whatever memory is attached."""
        from mlx_lm.generate import stream_generate
        from mlx_lm.sample_utils import make_sampler

        for response in stream_generate(
            self.anchor,
            self.tokenizer,
            tokens,
            max_tokens=max_tokens,
            sampler=make_sampler(temperature, top_p),
            logits_processors=self._logits_processors(),
            prompt_cache=prompt_cache,
        ):
            self.last = response
            yield response

    def _logits_processors(self) -> list[Callable[[mx.array, mx.array], mx.array]] | None:
        """Keeps a padded vocabulary's unused ids from being sampled."""
        real = self.config.get("effective_vocab_size")
        if not real:
            return None
        return [lambda _, logits: mx.where(mx.arange(logits.shape[-1]) < real, logits, -mx.inf)]


def load(folder: str | pathlib.Path, *, cache_bytes: int = 512 << 20) -> MemoryModel:
    """Opens a memory model (`anchor/` and `bank/`), or a plain mlx-lm folder without memory, by folder or hub id.

    Raises AnchorError, BankError, or AnchorMismatchError where the bank was made for another anchor.
    """
    folder = resolve(folder)
    anchor_folder = folder / "anchor" if (folder / "anchor").is_dir() else folder
    bank = MemoryBank.open(folder / "bank") if (folder / "bank").is_dir() else None
    if bank:
        bank.manifest.check_anchor(identify(anchor_folder))
    anchor, tokenizer, config = load_anchor(anchor_folder)
    return MemoryModel(anchor, tokenizer, config, bank, cache_bytes=cache_bytes)
