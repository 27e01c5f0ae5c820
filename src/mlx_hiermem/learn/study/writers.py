"""Who writes the free forms: a server that speaks OpenAI's protocol, or a model of mlx-lm in this process.

Both take requests and return replies, in this order; what was answered before comes from the kept replies. A
server is asked for several at a time. It answers late, or with an error, or not at all: what may be better the next
time is tried again by OpenAI's client, later and later.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mlx_hiermem.errors import MissingDependencyError, TeacherError, first_line
from mlx_hiermem.learn.study.teacher import Replies, Teacher, key_of

if TYPE_CHECKING:
    import openai

KEY = "OPENAI_API_KEY"  # the environment's name for it; a server on this machine needs none
TRIES = 5  # more, of a request that failed in a way that may pass; the client waits 0.5 to 8 seconds before each
LOST = 3  # requests in vain, each tried so often and none answered in between, after which the server is given up
LONGEST = 1 << 20  # characters of a reply that are kept
LONGEST_FAULT = 200  # characters of what a server says is wrong
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One thing that is asked for."""

    text: str
    tokens: int  # of the reply, at most
    temperature: float
    seed: int

    @property
    def key(self) -> str:
        return key_of([self.text, self.tokens, self.temperature, self.seed])


class Writer(Protocol):
    """Replies to requests. `fault` says why one had no reply."""

    fault: str

    def write(self, requests: Sequence[Request], kept: Replies) -> list[str | None]:
        """A reply for each request; None where there was none."""


@dataclass
class ServerWriter:
    """A model behind a server that speaks OpenAI's protocol."""

    url: str
    model: str = ""  # "": the first one that the server names
    at_once: int = 8
    seconds: float = 600.0  # until an answer must be there
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _client: openai.OpenAI | None = field(default=None, repr=False)
    _refused: set[str] = field(default_factory=set)  # options that this server does not take
    _lost: int = 0  # requests in vain since the last answer
    fault: str = ""

    def write(self, requests: Sequence[Request], kept: Replies) -> list[str | None]:
        """As `Writer.write`. Raises TeacherError where the server cannot be reached, or has refused the key."""
        return _all_of([functools.partial(self._reply, request, kept) for request in requests], self.at_once)

    def _reply(self, request: Request, kept: Replies) -> str | None:
        if (known := kept.get(request.key)) is not None:
            return str(known)
        reply = self._ask(request)
        if reply is not None:
            kept.keep(request.key, reply[:LONGEST])
        return reply

    def _ask(self, request: Request) -> str | None:
        import openai

        try:
            reply = self._completed(request)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._error(error, "") from error
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            with self._lock:
                self.fault = first_line(error)[:LONGEST_FAULT]
                # What is wrong with one request is not wrong with the server.
                self._lost = 0 if _is_refusal(error) else self._lost + 1
                lost = self._lost
            if lost >= LOST:
                raise self._error(error, "What it has answered is kept: run the same command again.") from error
            return None
        with self._lock:
            self._lost = 0
        return reply

    def _completed(self, request: Request) -> str:
        """The text of a reply. An option that the server refuses by its name is not sent again."""
        import openai

        client, model = self._connected()
        while True:
            refused = frozenset(self._refused)  # other threads add to it while this request is under way
            options: dict[str, Any] = {"temperature": request.temperature, "seed": request.seed}
            options = {name: value for name, value in options.items() if name not in refused}
            room = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
            options[room] = request.tokens
            try:
                messages = [{"role": "user", "content": request.text}]
                said: Any = client.chat.completions.create(model=model, messages=messages, **options)  # type: ignore
            except openai.APIStatusError as error:
                if not _is_refusal(error) or error.param not in options or error.param in refused:
                    raise
                self._refused.add(error.param)
                continue
            try:
                content = said.choices[0].message.content
            except (AttributeError, IndexError, TypeError) as error:  # whatever it is, it is no completion
                raise ValueError("what it sends is no chat completion") from error
            return content if isinstance(content, str) else ""

    def _connected(self) -> tuple[openai.OpenAI, str]:
        """The client, and the name of the model."""
        try:
            import openai
        except ImportError as error:
            raise MissingDependencyError(
                "a teacher's server needs openai's client", "pip install 'mlx-hiermem[learn]'"
            ) from error
        with self._lock:
            if self._client is None:
                key = os.environ.get(KEY) or "none"
                client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=TRIES, timeout=self.seconds)
                if not self.model:
                    try:
                        models = client.models.list().data or ()  # Ollama says null where it has none
                        self.model = next((row.id for row in models), "")
                    except (openai.OpenAIError, ValueError) as error:
                        raise self._error(error, "Start it first, or correct --teacher-url.") from error
                if not self.model:
                    raise TeacherError(f"{self.url} names no model", "Name one by --teacher-model.")
                self._client = client
            return self._client, self.model

    def _error(self, error: Exception, hint: str) -> TeacherError:
        """`hint` is for what the answer, if there is one, says nothing about."""
        import openai

        said = first_line(error)
        if isinstance(error, openai.APIConnectionError) and error.__cause__:  # itself it says no more than that
            said += f" ({first_line(error.__cause__)})"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            hint = f"Give the server's key in the environment: {KEY}."
        elif isinstance(error, openai.NotFoundError):
            hint = "Does --teacher-url end with /v1, and has the server a model of the name --teacher-model?"
        return TeacherError(f"the teacher at {self.url} does not answer: {said[:LONGEST_FAULT]}", hint)


def _is_refusal(error: Exception) -> bool:
    """Whether a server says that the request is wrong, and not that it has no time or no right."""
    return getattr(error, "status_code", None) in (400, 422)


def _all_of(calls: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """What all calls return. The first error, or Ctrl-C, ends this at once, and the calls that run are left behind.

    Not a ThreadPoolExecutor: the interpreter does not end before its threads, and a server may take an hour.
    """
    waiting, done = deque(range(len(calls))), queue.SimpleQueue[tuple[int, T | BaseException]]()

    def work() -> None:
        while True:
            try:
                number = waiting.popleft()
            except IndexError:
                return
            try:
                done.put((number, calls[number]()))
            except BaseException as error:  # raised where it is waited for
                waiting.clear()
                done.put((number, error))

    found = dict[int, T]()
    try:
        for _ in range(min(at_once, len(calls))):
            threading.Thread(target=work, daemon=True).start()
        while len(found) < len(calls):
            number, result = done.get()
            if isinstance(result, BaseException):
                raise result
            found[number] = result
    finally:
        waiting.clear()
    return [found[number] for number in range(len(calls))]


@dataclass
class ModelWriter:
    """A model of mlx-lm. It writes the requests of one call together, so these are kept together."""

    teacher: Teacher
    fault: str = ""

    def write(self, requests: Sequence[Request], kept: Replies) -> list[str | None]:
        """As `Writer.write`; all requests of a call have the same temperature and room."""
        if not requests:
            return []
        key, first = key_of([request.key for request in requests]), requests[0]
        if (known := kept.get(key)) is None:
            asked = [request.text for request in requests]
            known = self.teacher.replies(asked, first.tokens, first.temperature, first.seed)
            kept.keep(key, known)
        return list(known)
