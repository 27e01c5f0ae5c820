"""MemoryModel: an anchor, a bank and a router that together answer.

    print(model.chat("What is the capital of Laos?"))            # routed, fetched, attached
    for piece in model.stream("…", memory="none"): ...

For each prompt the router picks a path, the cache brings its blocks, and the attachment fills the slots.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Unpack

import mlx.nn as nn

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.batch import MemoryBatch
from mlx_hiermem.cache import BlockCache, Fetch
from mlx_hiermem.config import AnchorIdentity, Path
from mlx_hiermem.errors import AnchorError, ArgumentError, BankError
from mlx_hiermem.grammar import Grammars
from mlx_hiermem.memory.attach import Attachment, attach
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.prompt import Asked, Prompt
from mlx_hiermem.response import GrowingText, Response
from mlx_hiermem.sampling import Options, Sampling, behind, real_ids
from mlx_hiermem.selection import Selection
from mlx_hiermem.source_search import Source, SourceSearch, Text, asked
from mlx_hiermem.tokenizer import encode_chat, encode_text, framed
from mlx_hiermem.tree import Route

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

    from mlx_hiermem.router import Router

Wanted = Path | str  # what callers may write for a MemoryChoice


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
        name: str = "",
        identity: AnchorIdentity | None = None,
        attachment: Attachment | None = None,
    ) -> None:
        """`attachment`: where the anchor has one already, of another bank's (`model_folder.load`)."""
        self.identity = identity or (bank.manifest.anchor if bank else None)
        self.name = name or (bank.manifest.anchor.name if bank else str(config.get("model_type", "")))
        self.anchor, self.tokenizer, self.config, self.bank = anchor, tokenizer, config, bank
        self.cache = BlockCache(bank, cache_bytes) if bank else None
        self._router = router
        self.attachment = attachment or (attach(anchor, bank.config) if bank else None)
        self.selection = Selection()
        self.response: Response | None = None  # the last reply, a session's too

    def __repr__(self) -> str:
        memory = f"{len(self.bank.manifest.blocks)} blocks of memory" if self.bank else "no memory"
        context = f"{self.context} tokens of context" if self.context else "unknown context"
        return f"<MemoryModel {self.name}: {memory}, {context}>"

    @property
    def router(self) -> Router:
        """Loads the sentence embedder when a text is first routed."""
        bank = self.bank_for(MemoryChoice.FETCHED)
        if self._router is None:
            from mlx_hiermem.router import Router

            self._router = Router.of_bank(bank)
        return self._router

    def refresh(self) -> bool:
        """Takes up the bank again where it was edited since it was opened; whether that was so.

        What is attached stays until the next `select`. Raises BankError where the bank cannot be opened, or is
        one for another anchor or of another design now; this model is then unchanged.
        """
        if self.bank is None or self.cache is None:
            return False
        self.cache.away &= self.bank.is_away
        if not self.bank.is_edited:
            return False
        bank = MemoryBank.open(self.bank.root, self.bank.verify)
        bank.manifest.check_anchor(self.bank.manifest.anchor)
        _ = bank.policy  # and with it the tree: a damaged one shows now
        if self.attachment and not self.attachment.takes(bank.config):
            raise BankError(f"the bank {bank.root} has another design now", "Load the model again.")
        if self._router is not None:
            if bank.manifest.embedder != self.bank.manifest.embedder:
                raise BankError(f"the bank {bank.root} has another embedder now", "Load the model again.")
            old = self._router
            self._router = type(old)(bank.tree, old.embedder, bank.policy, bank.sources, old.pieces)
        cache = BlockCache(bank, self.cache.budget, stats=self.cache.stats)
        cache.take_over(self.cache)
        self.bank, self.cache = bank, cache
        return True

    @property
    def context(self) -> int | None:
        """Tokens that the anchor was made for, question and answer together; None where it does not say."""
        nested = self.config.get("text_config") or {}
        return self.config.get("max_position_embeddings") or nested.get("max_position_embeddings")

    @property
    def vocabulary(self) -> int:
        """Token ids that the anchor has rows for, without those that only pad."""
        config = {**self.config.get("text_config", {}), **self.config}
        return int(config.get("effective_vocab_size") or config.get("vocab_size") or len(self.tokenizer))

    @cached_property
    def grammars(self) -> Grammars:
        """Grammars that a reply can be held to."""
        return Grammars(self.tokenizer)

    @property
    def default_memory(self) -> MemoryChoice:
        """Fetched where the model has a bank."""
        return MemoryChoice.FETCHED if self.bank else MemoryChoice.NONE

    def choose(
        self, memory: Wanted, text: Text, blocked: Collection[Path] = (), route: Route | None = None
    ) -> Selection:
        """Which memory: a word of `MemoryChoice` (routed by `text`), or a path such as `10.7`. Fetches no block.

        `text` may be the questions of a conversation, of which the last is routed. `blocked` nodes are closed
        beside those of the bank's policy. With `route`, that is where the caller has found the text to go. Raises
        HierMemError for a memory there is not, BankError for a path that the tree does not have, or that leads
        through a blocked node.
        """
        wanted = MemoryChoice.parse(memory)
        if wanted == MemoryChoice.NONE:
            return Selection()
        bank = self.bank_for(wanted)
        if wanted.is_routed:
            route = route or self._route(text, blocked)
        else:
            bank.policy.check_open(wanted.path, bank.tree, blocked)
            route = Route(wanted.path)
        labels = tuple(bank.manifest.label(node) for node in route.path.prefixes())
        search = self.search if wanted.has_passage else None
        if search and self.cache and bank.is_away:
            self.cache.away, search = True, None
        return Selection(wanted, route, labels, search.passage(route.path, asked(text, route)) if search else None)

    def bank_for(self, wanted: MemoryChoice) -> MemoryBank:
        """The bank. Raises BankError where there is none, or none that has what is wanted."""
        if self.bank is None:
            raise BankError("this model has no bank", "Use memory none, or convert or learn a bank for it.")
        if wanted.has_passage and self.search is None:
            raise BankError("this bank keeps no sources", "Use memory fetched, or learn it without --no-sources.")
        return self.bank

    @property
    def search(self) -> SourceSearch | None:
        """Looks through the bank's sources; None where it keeps none."""
        sources = self.bank.sources if self.bank else None
        return SourceSearch(sources, self.router.embedder) if sources else None

    def sources(self, question: Text, answer: str = "") -> tuple[Source, ...]:
        """What the question's leaf has on it, best first; with an answer, only what says that answer.

        Raises BankError where the bank keeps no sources.
        """
        self.bank_for(MemoryChoice.SOURCE)
        chosen = self.choose(MemoryChoice.FETCHED, question)
        return self.sources_of(chosen, question, answer) or ()

    def sources_of(self, chosen: Selection, text: Text, answer: str) -> tuple[Source, ...] | None:
        """What says an answer that came with a memory; None where nothing is there to look through."""
        search = self.search
        if not chosen.path or search is None or (self.bank and self.bank.is_away):
            return None
        return search.find(chosen.path, asked(text, chosen.route), answer)

    def _route(self, text: Text, blocked: Collection[Path]) -> Route:
        if isinstance(text, str):
            return self.router.route(text, blocked)
        if not text:
            raise ArgumentError("memory fetched is routed by the user's messages, and there are none")
        return self.router.conversation(text, blocked).route

    def fetch(self, chosen: Selection) -> Fetch | None:
        """Brings the blocks of what was chosen into memory; None where there is no memory."""
        if self.cache is None or not chosen.memory.has_blocks:
            return None
        generic = chosen.memory == MemoryChoice.GENERIC
        return self.cache.fetch_generic() if generic else self.cache.fetch(chosen.path)

    def select(
        self, memory: Wanted, text: Text, blocked: Collection[Path] = (), route: Route | None = None
    ) -> Selection:
        """Chooses a memory (see `choose`), fetches it and attaches it. An edit of the bank is taken up first."""
        if route is None:
            self.refresh()
        return self.use(self.choose(memory, text, blocked, route))

    def use(self, chosen: Selection) -> Selection:
        """Fetches and attaches what was chosen."""
        start = time.perf_counter()
        fetch = self.fetch(chosen)
        fetched = time.perf_counter()
        if self.attachment is not None:
            self.attachment.set(fetch.memory if fetch else None)
        done = time.perf_counter()
        self.selection = chosen.attached(fetch, (fetched - start) * 1e3, (done - fetched) * 1e3)
        return self.selection

    def stream(
        self, prompt: Prompt, *, memory: Wanted | None = None, chat: bool = False, **options: Unpack[Options]
    ) -> Iterator[str]:
        """Yields the reply to a text, or to a conversation's messages, piece by piece; `response` then tells of it.

        A text is continued; with `chat` it is asked as a question, in the chat template. `memory` defaults to
        fetched where the model has a bank, and is routed by what the user said alone. `Options` lists the other
        options. Raises ArgumentError for what is no prompt, or no option.
        """
        sampling, asked = Sampling.of(options), Asked.of(prompt, chat, self.tokens, self.chat_tokens)
        wanted = MemoryChoice.parse(self.default_memory if memory is None else memory)
        return self._reply(asked, wanted, sampling)

    def generate(
        self, prompt: Prompt, *, memory: Wanted | None = None, chat: bool = False, **options: Unpack[Options]
    ) -> Response:
        """The whole reply; as `stream`."""
        for _ in self.stream(prompt, memory=memory, chat=chat, **options):
            pass
        assert self.response is not None  # the reply has come to its end
        return self.response

    def chat(self, prompt: Prompt, *, memory: Wanted | None = None, **options: Unpack[Options]) -> Response:
        """The reply to a question, or to a conversation's messages. A `Session` remembers what was said."""
        return self.generate(prompt, memory=memory, chat=True, **options)

    def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        memory: Wanted | Sequence[Wanted] | None = None,
        chat: bool = False,
        max_sequences: int = 8,
        **options: Unpack[Options],
    ) -> list[Response]:
        """The replies to several prompts, `max_sequences` at a time in one step, each with a memory of its own.

        `memory` is one for all, or one for each. All prompts are looked at before any is answered.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise ArgumentError(f"{prompts!r} is not a list of prompts", "`generate` answers a single one.")
        if memory is None or isinstance(memory, Path | str):
            memories: list[Wanted] = [memory or self.default_memory] * len(prompts)
        else:
            memories = list(memory)
        if len(memories) != len(prompts):
            raise ArgumentError(f"there are {len(memories)} memories for {len(prompts)} prompts")
        sampling = Sampling.of(options)
        asked = [Asked.of(prompt, chat, self.tokens, self.chat_tokens) for prompt in prompts]
        self.refresh()
        chosen = [self.choose(one, each.questions) for one, each in zip(memories, asked, strict=True)]
        tokens = [each.tokens(memory.passage) for each, memory in zip(asked, chosen, strict=True)]
        try:
            found = MemoryBatch(self, max_sequences).replies(tokens, chosen, sampling)
            return [
                replace(response, find=partial(self.sources_of, response.selection, each.questions, response.text))
                for response, each in zip(found, asked, strict=True)
            ]
        finally:
            self.selection = Selection()
            if self.attachment:
                self.attachment.clear()

    def _reply(self, asked: Asked, memory: MemoryChoice, sampling: Sampling) -> Iterator[str]:
        self.response, text, last = None, GrowingText(tuple(sampling.stop)), None
        selection = self.select(memory, asked.questions)
        try:
            tokens = asked.tokens(selection.passage)
            for last in self.responses(tokens, sampling.fitted(len(tokens), self.context)):
                yield text.add(last.text, last=last.finish_reason is not None)
                if text.stopped:
                    break
        finally:  # whoever has read enough is told of it too
            if last is not None:
                find = partial(self.sources_of, selection, asked.questions, text.text)
                self.response = Response.of(text, last, selection, find)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the tokenizer's beginning; no text in it is a control token."""
        if self.tokenizer is None:
            raise AnchorError("this anchor has no tokenizer", "Convert it again with --tokenizer.")
        return encode_text(self.tokenizer, text)

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer is not None and self.tokenizer.chat_template is not None

    @property
    def can_chat(self) -> bool:
        """Whether questions can be put: in a chat template, or in the frame in which the bank has learnt them."""
        return self.has_chat_template or (
            self.tokenizer is not None and self.bank is not None and self.bank.manifest.knows_questions
        )

    def chat_tokens(self, messages: list[dict[str, Any]], **template: Any) -> list[int]:
        """Token ids of a conversation in the anchor's chat template, ready for the assistant's reply.

        `template` are variables of the template, such as `enable_thinking`. A base model has none; where its bank
        has learnt questions, they are put as they were learnt.
        """
        if not self.can_chat:
            raise AnchorError("this anchor has no chat template", "`hiermem ask --plain` continues a text.")
        if not self.has_chat_template:
            return self.tokens(framed(messages))
        return encode_chat(self.tokenizer, messages, **template)

    def responses(
        self,
        tokens: list[int],
        sampling: Sampling,
        prompt_cache: list[Any] | None = None,
        cached: Sequence[int] = (),
    ) -> Iterator[GenerationResponse]:
        """mlx-lm's generation with whatever memory is attached; `prompt_cache` holds the `cached` tokens."""
        from mlx_lm.generate import stream_generate

        sampling.check_tokens(self.vocabulary)
        sampling.check_cache(self.anchor)
        yield from stream_generate(
            self.anchor,
            self.tokenizer,
            tokens,
            max_tokens=sampling.max_tokens,
            sampler=sampling.draw(),
            logits_processors=[
                *real_ids(self.config.get("effective_vocab_size")),
                *(behind(cached, one) for one in sampling.processors()),
            ],
            prompt_cache=prompt_cache,
            kv_bits=sampling.kv_bits,
            kv_group_size=sampling.kv_group_size,
            quantized_kv_start=sampling.quantized_kv_start,
        )
