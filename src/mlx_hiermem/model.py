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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.anchor import identify, load_anchor
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.cache import BlockCache, Fetch
from mlx_hiermem.config import MemoryChoice, Path
from mlx_hiermem.errors import AnchorError, BankError
from mlx_hiermem.memory.attach import Attachment, attach
from mlx_hiermem.share.resolve import resolve
from mlx_hiermem.tokenizer import encode_chat, encode_text
from mlx_hiermem.tree import Route

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from mlx_hiermem.router import Router

Wanted = Path | str  # what callers may write for a MemoryChoice
UNROUTED = Route()


@dataclass(frozen=True)
class Selection:
    """Which memory a text gets: what was wanted, where the text went, and, once its blocks are attached, these."""

    memory: MemoryChoice = MemoryChoice.NONE
    route: Route = UNROUTED
    labels: tuple[str, ...] = ()  # of the path's nodes
    blocks: tuple[str, ...] = ()  # what is attached: equal blocks mean equal weights
    memory_bytes: int = 0
    bytes_read: int = 0  # from disk
    fetch_ms: float = 0.0
    attach_ms: float = 0.0

    @property
    def path(self) -> Path:
        return self.route.path

    def to_json(self) -> dict[str, Any]:
        route = self.route
        return {
            "memory": self.memory,
            "path": str(route.path),
            "labels": list(self.labels),
            "distances": list(route.distances),
            "avoided": [str(node) for node in route.avoided],
            "stayed": route.stayed,
            "far": route.far,
            "blocks": list(self.blocks),
            "memory_bytes": self.memory_bytes,
            "bytes_read": self.bytes_read,
            "route_ms": route.milliseconds,
            "fetch_ms": self.fetch_ms,
            "attach_ms": self.attach_ms,
        }


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
        self.attachment: Attachment | None = attach(anchor, bank.config) if bank else None
        self.selection = Selection()
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

    @property
    def context(self) -> int | None:
        """Tokens that the anchor was made for, question and answer together; None where it does not say."""
        nested = self.config.get("text_config", {})
        return self.config.get("max_position_embeddings") or nested.get("max_position_embeddings")

    @property
    def default_memory(self) -> MemoryChoice:
        """Fetched where the model has a bank."""
        return MemoryChoice.FETCHED if self.bank else MemoryChoice.NONE

    def choose(
        self, memory: Wanted, text: str, blocked: Collection[Path] = (), route: Route | None = None
    ) -> Selection:
        """Which memory: `none`, `generic`, `fetched` (routed by `text`), or a path such as `10.7`. Fetches nothing.

        `blocked` nodes are closed beside those of the bank's policy. With `route`, fetched is what the caller has
        found already. Raises HierMemError for a memory there is not, BankError for a path that the tree does not
        have, or that leads through a blocked node.
        """
        wanted = MemoryChoice.parse(memory)
        if wanted == MemoryChoice.NONE:
            return Selection()
        if self.bank is None:
            raise BankError("this model has no bank", "Use memory none, or convert or learn a bank for it.")
        if wanted == MemoryChoice.FETCHED:
            route = route or self.router.route(text, blocked)
        else:
            self._check_open(wanted.path, blocked)
            route = Route(wanted.path)
        return Selection(wanted, route, tuple(self.bank.manifest.label(node) for node in route.path.prefixes()))

    def _check_open(self, path: Path, blocked: Collection[Path]) -> None:
        """Raises BankError for a path that the tree does not have, or that is closed."""
        assert self.bank is not None  # `choose` has seen to it
        if path:
            self.bank.tree.check([path])
            closed = self.bank.policy.block(blocked).blocker(path)
            if closed is not None:
                raise BankError(f"the memory {path} is blocked (at {closed})", "Take another path, or unblock it.")

    def fetch(self, chosen: Selection) -> Fetch | None:
        """Brings the blocks of what was chosen into memory; None where there is no memory."""
        if self.cache is None or chosen.memory == MemoryChoice.NONE:
            return None
        generic = chosen.memory == MemoryChoice.GENERIC
        return self.cache.fetch_generic() if generic else self.cache.fetch(chosen.path)

    def select(
        self, memory: Wanted, text: str, blocked: Collection[Path] = (), route: Route | None = None
    ) -> Selection:
        """Chooses a memory (see `choose`), fetches it and attaches it."""
        chosen = self.choose(memory, text, blocked, route)
        start = time.perf_counter()
        fetch = self.fetch(chosen)
        fetched = time.perf_counter()
        if self.attachment is not None:
            self.attachment.set(fetch.memory if fetch else None)
        done = time.perf_counter()
        self.selection = attached(chosen, fetch, (fetched - start) * 1e3, (done - fetched) * 1e3)
        return self.selection

    def stream(
        self,
        prompt: str,
        *,
        memory: Wanted | None = None,
        chat: bool = False,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """Yields the continuation's text piece by piece; `self.selection` and `self.last` have the figures.

        `memory` defaults to fetched where the model has a bank. `chat` wraps the prompt in the chat template;
        the route is computed from the prompt alone either way.
        """
        self.select(memory or self.default_memory, prompt)
        tokens = self.chat_tokens([{"role": "user", "content": prompt}]) if chat else self.tokens(prompt)
        for response in self.responses(tokens, max_tokens, temperature, top_p):
            yield response.text

    def generate(self, prompt: str, **options: Any) -> str:
        """The whole continuation; options as for `stream`."""
        return "".join(self.stream(prompt, **options))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the tokenizer's beginning; no text in it is a control token."""
        if self.tokenizer is None:
            raise AnchorError("this anchor has no tokenizer", "Convert it again with --tokenizer.")
        return encode_text(self.tokenizer, text)

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the anchor's chat template, ready for the assistant's reply."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise AnchorError("this anchor has no chat template", "Use `hiermem generate` with a plain prompt.")
        return encode_chat(self.tokenizer, messages)

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


def attached(chosen: Selection, fetch: Fetch | None, fetch_ms: float, attach_ms: float) -> Selection:
    """What was chosen, now that it is fetched and attached."""
    return replace(
        chosen,
        blocks=fetch.blocks if fetch else (),
        memory_bytes=fetch.memory.nbytes if fetch and fetch.memory else 0,
        bytes_read=fetch.bytes_read if fetch else 0,
        fetch_ms=fetch_ms,
        attach_ms=attach_ms,
    )


def load(folder: str | pathlib.Path, *, cache_bytes: int = 512 << 20) -> MemoryModel:
    """Opens a memory model (`anchor/` and `bank/`), or a plain mlx-lm folder without memory, by folder or hub id.

    Raises AnchorError, BankError, or AnchorMismatchError where the bank was made for another anchor.
    """
    folder = resolve(folder)
    anchor_folder = folder / "anchor" if (folder / "anchor").is_dir() else folder
    bank = MemoryBank.open(folder / "bank") if (folder / "bank").is_dir() else None
    if bank and bank.remote and anchor_folder == folder:
        bring = f"hiermem bank pull {bank.remote.origin.repo} {folder} --lazy"
        raise AnchorError(f"{folder} was pulled without its anchor", f"`{bring}` brings it.")
    if bank:
        bank.manifest.check_anchor(identify(anchor_folder))
    anchor, tokenizer, config = load_anchor(anchor_folder)
    return MemoryModel(anchor, tokenizer, config, bank, cache_bytes=cache_bytes)
