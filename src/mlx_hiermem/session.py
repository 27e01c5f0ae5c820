"""A conversation: its messages, the path it is on, and the KV cache that goes with that path.

`Router.turn` decides each turn's path. After a change of path only the first memory layer's inputs would still be
right, so the prompt is prefilled again; on the same path the cache goes on. The caches of earlier paths are kept,
within a budget: a conversation that returns to a topic computes what was said since. A conversation that outgrows
the model's context loses its oldest turns, never its system message.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_hiermem.bank.sources import SourceWindow
from mlx_hiermem.config import Path
from mlx_hiermem.errors import ArgumentError, BankError, ChatTemplateError, HierMemError
from mlx_hiermem.files import MALFORMED
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel, Wanted
from mlx_hiermem.prompt import History, begin
from mlx_hiermem.response import GrowingText, Response
from mlx_hiermem.router import Topic, Turn
from mlx_hiermem.sampling import Options, Sampling
from mlx_hiermem.selection import Selection
from mlx_hiermem.source_search import messages_with

if TYPE_CHECKING:
    from mlx_lm.generate import GenerationResponse

Message = dict[str, str]

FORMAT, VERSION = "mlx-hiermem-chat", 1
REPLY = 512  # tokens of a reply at most, where nothing else is said
EARLIER, EARLIER_BYTES = 8, 256 << 20  # KV caches of earlier paths that are kept at most
KEPT = 0.75  # of the prompt's room is filled after turns were dropped, so that not every turn drops another


class Session:
    """`ask` streams a reply and remembers it. It prints nothing; what happened is in the attributes."""

    def __init__(
        self,
        model: MemoryModel,
        memory: Wanted | None = None,
        *,
        system: str = "",
        blocked: Collection[Path] = (),
        earlier: int = EARLIER,
        template: Mapping[str, Any] | None = None,
        history: History = "topic",
        **options: Unpack[Options],
    ) -> None:
        """`memory` is fetched by default, where the model has a bank. `blocked` nodes are closed to this talk.

        `earlier` is how many KV caches of earlier paths are kept at most. `template` are variables of the anchor's
        chat template. `history` says whether a question that leads to a path of its own sees what was said before
        (`all`). The options are those of `generate`; a reply has at most 512 tokens where they do not say.
        """
        if not isinstance(model, MemoryModel):
            raise ArgumentError(f"{model!r} is no model", "`load` opens one.")
        self.model, self._memory = model, MemoryChoice.parse(memory or model.default_memory)
        self.system, self.blocked, self.template, self.history = system, blocked, dict(template or {}), history
        self.sampling = Sampling.of(options, max_tokens=REPLY)
        self.sampling.check_cache(model.anchor)
        self.messages: list[Message] = []  # the user's and the assistant's
        self.topic: Topic | None = None
        self.turn: Turn | None = None  # how the last question was routed, where it was
        self.first = 0  # of the messages, the first that there is room for
        self.shown = 0  # the first that the last question saw
        self.dropped = 0  # turns that the last question pushed out
        self.prefilled = 0  # tokens of the last prompt that had to be computed
        self.last: GenerationResponse | None = None  # figures of the last reply
        self.selection = Selection(self.memory)
        self._cache: list[Any] = []
        self._cached: list[int] = []  # the tokens whose keys and values are in the cache, as far as known
        self._key: tuple[str, ...] = ()  # of the memory that they were computed under
        self._bank = model.bank  # as it was when it was last looked at; see `_look_again`
        self._earlier = LRUPromptCache(earlier, EARLIER_BYTES)  # by that key and the tokens
        self._drafted: tuple[Any, Turn] | None = None  # where the text goes that is being typed
        self._ahead: Future[None] | None = None

    def __repr__(self) -> str:
        turns = sum(message["role"] == "user" for message in self.messages)
        tokens = f"{self.kv_tokens} of {self.context or 'any number of'} tokens"
        return f"<Session with {self.model.name}: memory {self.memory}, {turns} turns, {tokens}>"

    @property
    def memory(self) -> MemoryChoice:
        """The memory of the turns to come. `use` changes it too, and looks whether there is such a memory."""
        return self._memory

    @memory.setter
    def memory(self, wanted: Wanted) -> None:
        self._memory = MemoryChoice.parse(wanted)

    @property
    def context(self) -> int | None:
        """See `MemoryModel.context`."""
        return self.model.context

    @property
    def is_away(self) -> bool:
        """Whether the last question had to do without blocks of a bank that cannot be reached."""
        return bool(self.model.cache and self.model.cache.away)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache."""
        return max((cache.offset for cache in self._cache if hasattr(cache, "offset")), default=0)

    def use(self, memory: Wanted) -> None:
        """Changes the memory of the turns to come; the first that is routed again is routed alone.

        Raises BankError or HierMemError where there is no such memory, and changes nothing.
        """
        self._look_again()
        wanted = MemoryChoice.parse(memory)
        if wanted.is_routed:
            self.model.bank_for(wanted)
            self.selection = Selection(wanted)
        else:
            self.selection = self.model.select(wanted, "", self.blocked)
        self._memory, self.topic, self.turn = wanted, None, None

    def ask(self, question: str) -> Generator[str, None, None]:
        """Streams the reply. A reply that is broken off keeps what was said so far; nothing said, nothing asked.

        Raises HierMemError where the question alone is too long for the model.
        """
        if not isinstance(question, str):
            raise ArgumentError(f"{question!r} is no question", "It is a text; the session remembers the others.")
        self.messages.append({"role": "user", "content": question})
        self.last, self.model.response = None, None
        reply, generated, complete = "", list[int](), False
        before = self.topic, self.turn, self.selection, self.first, self.shown, self.dropped
        text = GrowingText(tuple(self.sampling.stop))
        try:
            tokens = self._prepare(question)
            rest = self._reuse(tokens)
        except BaseException:
            self.messages.pop()
            self._check_cache()
            raise
        try:
            sampling = replace(self.sampling, max_tokens=self._room(len(tokens)))
            for response in self.model.responses(
                rest, sampling, prompt_cache=self._cache, cached=tokens[: len(tokens) - len(rest)]
            ):
                self.last = response
                generated.append(response.token)
                piece = text.add(response.text, last=response.finish_reason is not None)
                reply += piece
                yield piece
                if text.stopped:
                    break
            complete = True
        finally:
            self._cached = tokens + generated
            self._check_cache()
            if self.last is not None:
                find = partial(self.model.sources_of, self.selection, self.questions, text.text)
                self.model.response = Response.of(text, self.last, self.selection, find, len(tokens))
            if reply or complete:
                self.messages.append({"role": "assistant", "content": reply})
            else:
                self.messages.pop()
                self.topic, self.turn, self.selection, self.first, self.shown, self.dropped = before

    def route(self, text: str) -> Turn:
        """Where a question would go now. Raises BankError where there is no bank."""
        self._look_again()
        if self._drafted and self._drafted[0] == self._routed_by(text):
            return self._drafted[1]
        return self.model.router.turn(text, self.topic, self.blocked)

    def draft(self, text: str) -> None:
        """While a question is typed: routes it as far as it is there, and has its blocks read ahead.

        Nothing is attached, and nothing is remembered but the route, for the case that the text stays as it is.
        """
        if not self.memory.is_routed or not text.strip():
            return
        turn = self.route(text)
        self._drafted = self._routed_by(text), turn
        if self._ahead:
            self._ahead.cancel()  # if it has not begun
        if self.model.cache and self.memory.has_blocks:
            self._ahead = self.model.cache.prefetch(turn.route.path)

    def reset(self) -> None:
        """Forgets the conversation; the system message and the memory stay."""
        self.messages.clear()
        self.first, self.shown, self.topic, self.turn = 0, 0, None, None
        self._cache, self._cached = [], []
        self._earlier.trim_to(n_sequences=0)

    @property
    def questions(self) -> list[str]:
        """The user's messages."""
        return [message["content"] for message in self.messages if message["role"] == "user"]

    def _routed_by(self, text: str) -> tuple[Any, ...]:
        """All that a route depends on."""
        return text, self.topic, frozenset(self.blocked), self.model.router.policy, self.model.bank

    def _look_again(self) -> None:
        """Takes up an edit of the bank; keys and values that were computed under blocks of before go."""
        self.model.refresh()
        bank = self.model.bank
        if bank is self._bank:
            return
        self._bank, self._drafted = bank, None
        self._cache, self._cached, self._key = [], [], ()
        self._earlier.trim_to(n_sequences=0)
        if self.topic and bank and not bank.tree.has(self.topic.path):
            self.topic = None

    def _prepare(self, text: str) -> list[int]:
        """Routes the question, attaches its memory and returns the prompt's tokens."""
        self._look_again()
        turn = self.route(text) if self.memory.is_routed else None
        chosen = self.model.choose(self.memory, self.questions, self.blocked, turn.route if turn else None)
        shown = max(self.first, begin(self.messages, chosen, self.history))
        start, dropped, tokens = self._fit(shown, chosen.passage)
        self.selection = self.model.use(chosen)
        self.first, self.shown = start if dropped else self.first, start
        self.dropped, self.turn = dropped, turn
        self.topic = turn.topic if turn else None
        return tokens

    def _tokens(self, first: int, passage: SourceWindow | None) -> list[int]:
        """The prompt from a message on, behind the system message. A passage is for the last question alone."""
        messages = messages_with(self.messages[first:], passage)
        if not self.system:
            return self.model.chat_tokens(messages, **self.template)
        try:
            system = {"role": "system", "content": self.system}
            return self.model.chat_tokens([system, *messages], **self.template)
        except ChatTemplateError as error:
            reason = error.__cause__ or error
            raise ChatTemplateError(f"the anchor's chat template takes no system message: {reason}") from error

    def _fit(self, first: int, passage: SourceWindow | None) -> tuple[int, int, list[int]]:
        """(first message, turns dropped now, prompt): the newest turns that leave room for the reply."""
        tokens = self._tokens(first, passage)
        if self.context is None or len(tokens) <= self.context - self._reserve:
            return first, 0, tokens
        # What is left must be prefilled again as a whole, so make room for more than this turn.
        goal = KEPT * (self.context - self._reserve)
        starts = [i for i, m in enumerate(self.messages) if m["role"] == "user" and i >= first]
        start = next((i for i in starts[1:] if len(self._tokens(i, passage)) <= goal), starts[-1])
        tokens = self._tokens(start, passage)
        if len(tokens) > self.context - self._reserve:
            raise HierMemError(
                f"the question has {len(tokens)} tokens, system message included; the model has room for "
                f"{self.context - self._reserve} beside a reply of {self._reserve}",
                "Ask a shorter question, or allow a shorter reply with --max-tokens.",
            )
        return start, starts.index(start), tokens

    @property
    def _reserve(self) -> int:
        """Tokens kept free for the reply: what was asked for, but not more than half of the context."""
        return min(self.sampling.max_tokens, self.context // 2) if self.context else self.sampling.max_tokens

    def _room(self, prompt: int) -> int:
        """The longest possible reply to a prompt of so many tokens."""
        return min(self.sampling.max_tokens, self.context - prompt) if self.context else self.sampling.max_tokens

    def _reuse(self, tokens: list[int]) -> list[int]:
        """Makes the cache a prefix of `tokens`, as long as it can be; returns the tokens still to compute."""
        if self._key != self.selection.key:
            self._change_cache(tokens)
        shared = 0
        if self._cache:
            known = self._cached[: self.kv_tokens]
            pairs = zip(known, tokens[:-1], strict=False)  # the last token is always computed
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(known), len(tokens) - 1))
        surplus = self.kv_tokens - shared
        if not shared or (surplus and not can_trim_prompt_cache(self._cache)):
            self._cache, shared = make_prompt_cache(self.model.anchor), 0
        elif surplus:
            trim_prompt_cache(self._cache, surplus)
        self.prefilled = len(tokens) - shared
        return tokens[shared:]

    def _change_cache(self, tokens: list[int]) -> None:
        """Puts the cache aside, for when this path comes again, and takes up what there is for the new path."""
        known = self._cached[: self.kv_tokens]
        surplus = self.kv_tokens - len(known)
        if known and (not surplus or can_trim_prompt_cache(self._cache)):
            trim_prompt_cache(self._cache, surplus)
            self._earlier.insert_cache(self._key, known, self._cache)
        self._key = self.selection.key
        cache, rest = self._earlier.fetch_nearest_cache(self._key, tokens)
        self._cache, self._cached = cache or [], tokens[: len(tokens) - len(rest)]

    def _check_cache(self) -> None:
        """A cache whose layers are not equally far is of no use: Ctrl-C can strike between two layers."""
        offsets = {getattr(cache, "offset", None) for cache in self._cache}
        if len(offsets) != 1 or None in offsets:
            self._cache, self._cached = [], []

    def to_json(self) -> dict[str, Any]:
        """What `restore` needs."""
        there = self.topic if self.topic and self.topic.path else None  # beyond the reach there is no path
        topic = asdict(there) | {"path": str(there.path)} if there else None
        return {
            "format": FORMAT,
            "version": VERSION,
            "memory": self.memory,
            "system": self.system,
            "topic": topic,
            "messages": self.messages,
        }

    def restore(self, data: Any) -> None:
        """Takes up a saved conversation. Raises HierMemError where it is not one, and changes nothing.

        A topic that this model's bank does not have is forgotten: the next turn is routed alone. So is a pinned
        path that is blocked or gone: the memory is then the model's default.
        """
        try:
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {data['format']} {data['version']} is not {FORMAT} {VERSION}")
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]]
            if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
                raise ValueError("the user and the assistant do not take turns")
            system, memory, saved = str(data["system"]), str(data["memory"]), data["topic"]
            topic = _topic(saved) if saved and saved["path"] else None
        except MALFORMED as error:
            raise HierMemError(f"this is not a saved conversation: {error}") from error
        try:
            self.use(memory)
        except BankError:
            self.use(self.model.default_memory)
        self.reset()
        self.messages, self.system = messages, system
        bank = self.model.bank
        self.topic = topic if topic and bank and bank.tree.has(topic.path) else None


def _topic(saved: Any) -> Topic:
    """As it was saved; older conversations know less of it."""
    question, aside = (str(saved.get(name, "")) for name in ("question", "aside"))
    return Topic(Path.parse(saved["path"]), float(saved["decided"]), question, aside, int(saved.get("turns", 0)))
