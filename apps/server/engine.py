"""The thread that owns MLX, and what the event loop sees of it.

All arrays are made and used on one thread: it loads the models, chooses memories, and decodes one token of every
sequence in turn. It has one batch for each anchor in memory; models that differ in their bank alone share one.
Requests reach it through an inbox of calls; what comes of them goes back to the event loop. A block that is on the
hub is brought by a thread pool, so that a slow hub delays no other request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from mlx_hiermem.apps.server.job import Event, Job, Started
from mlx_hiermem.apps.server.left_behind import leave_behind
from mlx_hiermem.apps.server.refusal import ApiError, unexpected
from mlx_hiermem.apps.server.text import Piece
from mlx_hiermem.batch import MemoryBatch, Token
from mlx_hiermem.errors import AnchorError, AssetError, BankError, HierMemError, HubError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.selection import Selection

DOWNLOADS = 4  # at once
SMOOTHING = 0.2  # of the measured tokens/s: the weight of the newest step

log = logging.getLogger(__name__)
T = TypeVar("T")


class Engine:
    """`start` it, give it the `loop`, `submit` jobs; `stop` it. What belongs to the models is its thread's own.

    `load` gives the models by the names that clients use, the first for requests that name none.
    """

    def __init__(self, load: Callable[[], dict[str, MemoryModel]], max_batch: int = 8, max_queue: int = 32) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self.most = max_batch + max_queue  # sequences that are decoded or wait
        self.loop: asyncio.AbstractEventLoop | None = None
        self.models: dict[str, MemoryModel] = {}
        self._batches: dict[int, MemoryBatch] = {}  # by the anchor's id
        self._rate = 0.0
        self._away: set[pathlib.Path] = set()  # banks that cannot be reached
        self.failure: BaseException | None = None  # what ended the thread
        self._load = load
        self._open: set[Job] = set()  # the event loop's: submitted, and not ended yet
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: deque[Job] = deque()
        self._running: dict[tuple[MemoryBatch, int], Job] = {}  # by the batch and the sequence's id in it
        self._pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="bring")
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self._loaded: Future[None] = Future()

    # Of the thread that starts the server, and of the event loop.

    def start(self) -> None:
        """Returns once the model is loaded; raises what loading it raised, and KeyboardInterrupt meanwhile."""
        self._thread.start()
        try:
            self._loaded.result()
        except KeyboardInterrupt:
            self.stop(0)
            raise

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after the step that it is at. One that takes longer is left behind."""
        self._inbox.put(None)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout)
        if self._thread.is_alive():
            leave_behind(self._thread)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    @property
    def model(self) -> MemoryModel:
        """The one for requests that name none."""
        return next(iter(self.models.values()))

    @property
    def batch(self) -> MemoryBatch:
        """That model's."""
        return self._batch_of(self.model)

    @property
    def active(self) -> int:
        """Sequences that are decoded now."""
        return len(self._running)

    @property
    def rate(self) -> float:
        """Tokens/s of all sequences together."""
        return self._rate if self._running else 0.0

    @property
    def queued(self) -> int:
        """Sequences that wait for room, or for their memory."""
        return sum(not job.started for job in self._open)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of them, or raises ApiError and queues none."""
        self._check_alive()
        if len(self._open) + len(jobs) > self.most:
            raise ApiError(503, "the queue is full; try again in a moment", code="queue_full")
        self._open.update(jobs)
        for job in jobs:
            self._inbox.put(lambda job=job: self._choose(job))  # type: ignore[misc]

    def cancel(self, job: Job) -> None:
        """Takes a sequence out, wherever it is by now. No event of it comes any more."""
        job.cancelled = True
        self._open.discard(job)

    def fail_open(self, error: ApiError) -> None:
        """Ends every sequence that has not ended."""
        for job in list(self._open):
            self._deliver(job, error)
            job.cancelled = True

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, called on the engine's thread."""
        self._check_alive()
        if self._inbox.qsize() > self.max_queue:
            raise ApiError(503, "the server is busy; try again in a moment", code="queue_full")
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self._inbox.put(run)
        return await asyncio.wrap_future(future)

    def _check_alive(self) -> None:
        if not self.alive:
            raise ApiError(500, "the server's engine has stopped; start the server again", code="engine_stopped")

    def _deliver(self, job: Job, event: Event) -> None:
        if job not in self._open:
            return
        job.started = True
        if isinstance(event, ApiError) or (isinstance(event, Piece) and event.finish_reason):
            self._open.discard(job)
        job.events.put_nowait((job, event))

    # Of the engine's own thread.

    def _live(self) -> None:
        try:
            for name, model in self._load().items():
                self.serve(name, model)
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        try:
            while self._turn():
                pass
            for batch in self._batches.values():
                batch.close()
        except BaseException as error:
            log.exception("the engine has stopped")
            self.failure = error
            self._on_loop(self.fail_open, ApiError(500, "the server's engine has stopped", code="engine_stopped"))

    def serve(self, name: str, model: MemoryModel) -> None:
        """Adds a model, or replaces the one of this name, whose running sequences go on. On the engine's thread."""
        if model.tokenizer is None:
            raise AnchorError("this anchor has no tokenizer", "Convert it again with --tokenizer.")
        if model.bank:
            _ = model.router  # its embedder is loaded now, not at the first request
        self._batch_of(model)
        self.models = {**self.models, name: model}  # others read it meanwhile

    def drop(self, name: str) -> None:
        """Serves a model no longer; its running sequences go on. On the engine's thread."""
        self.models = {other: model for other, model in self.models.items() if other != name}

    def _batch_of(self, model: MemoryModel) -> MemoryBatch:
        key = id(model.anchor)
        if key not in self._batches:
            self._batches[key] = MemoryBatch(model, self.max_batch)
        return self._batches[key]

    def _turn(self) -> bool:
        """At most one call from the inbox, and one step. False at the end."""
        idle = not self._running and not self._ready
        with contextlib.suppress(queue.Empty):
            call = self._inbox.get(block=idle)
            if call is None:
                return False
            call()
        for batch, uid in [key for key, job in self._running.items() if job.cancelled]:
            batch.remove(uid)
            del self._running[batch, uid]
        self._admit()
        self._step()
        self._forget()
        return True

    def _forget(self) -> None:
        """Lets an anchor go that no model has any more, once its last sequence has ended."""
        served = {id(model.anchor) for model in self.models.values()}
        for key in [key for key, batch in self._batches.items() if key not in served and not batch]:
            self._batches.pop(key).close()

    def _choose(self, job: Job) -> None:
        """Routes a job; it is ready, or waits for the hub."""
        if job.cancelled:
            return
        model, batch = job.model, self._batch_of(job.model)
        try:
            self.refresh(model)
            chosen = model.choose(job.memory, job.texts, job.blocked)
            job.take(chosen)
            missing = batch.missing(chosen, model)
        except (AssetError, HubError) as error:
            self._post(job, ApiError(503, str(error)))
        except HierMemError as error:
            self._post(job, error if isinstance(error, ApiError) else ApiError(400, str(error), "memory"))
        except Exception as error:
            self._post(job, unexpected(error))
        else:
            if missing:
                self._pool.submit(self._bring, job, chosen)
            else:
                if model.cache and chosen.path and not batch.room:
                    model.cache.prefetch(chosen.path)  # while it waits for room
                self._ready.append(job)

    def refresh(self, model: MemoryModel) -> None:
        """Takes up an edit of the bank, on the engine's thread; one that cannot be read is logged and left."""
        try:
            if model.refresh():
                self._batch_of(model).forget()
                log.info("took up the edited bank %s", model.bank)
        except HierMemError as error:
            log.warning("goes on with the bank as it was: %s", error)

    def _bring(self, job: Job, chosen: Selection) -> None:
        """Downloads a job's blocks, on a thread of the pool."""
        try:
            self._batch_of(job.model).bring(chosen, job.model)
        except HierMemError as error:
            self._post(job, ApiError(503, str(error), code="hub_unavailable"))
        except Exception as error:
            self._post(job, unexpected(error))
        else:
            self._inbox.put(lambda: self._ready.append(job))

    def _admit(self) -> None:
        """Moves jobs into their batches while there is room, oldest first."""
        for _ in range(len(self._ready)):
            job = self._ready.popleft()
            batch = self._batch_of(job.model)
            if job.cancelled or job.chosen is None:
                continue
            if not batch.room:
                self._ready.append(job)
                continue
            if job.bank is not job.model.bank:  # edited while it waited: its path may be gone
                self._choose(job)
                continue
            try:
                uid, selection = batch.add(job.tokens, job.chosen, job.sampling, job.model)
            except BankError as error:
                self._post(job, ApiError(500, str(error)))
            except HierMemError as error:
                self._post(job, ApiError(400, str(error)))
            except Exception as error:
                self._post(job, unexpected(error))
            else:
                self._running[batch, uid] = job
                self._tell_of_drive(job.model)
                self._post(job, Started(selection.to_json(), batch.cached_tokens(uid)))

    def _tell_of_drive(self, model: MemoryModel) -> None:
        """Logs, once, that a bank cannot be reached, and that it is back."""
        away = bool(model.cache and model.cache.away)
        if model.bank and away != (model.bank.root in self._away):
            log.warning("%s %s", model.bank, "cannot be reached: goes on with its cache" if away else "is back")
            self._away ^= {model.bank.root}

    def _step(self) -> None:
        if not self._running:
            self._rate = 0.0
            return
        start, count = time.perf_counter(), 0
        for batch in [batch for batch in self._batches.values() if batch]:
            try:
                tokens = batch.step()
                for token in tokens:
                    self._take(batch, token)
            except Exception as error:  # whatever it is: its sequences are told, the other batches go on
                self._start_over(batch, error)
            else:
                count += len(tokens)
        self._rate += SMOOTHING * (count / (time.perf_counter() - start) - self._rate)

    def _take(self, batch: MemoryBatch, token: Token) -> None:
        """Hands a token's text on. A stop string ends the sequence, which the batch goes on with otherwise."""
        job = self._running[batch, token.uid]
        piece = job.reply.add(token)
        if piece:
            self._post(job, self._with_sources(job, piece) if piece.finish_reason else piece)
            if piece.finish_reason:
                del self._running[batch, token.uid]
                if not token.finish_reason:
                    batch.remove(token.uid)

    def _with_sources(self, job: Job, last: Piece) -> Piece:
        """A reply's last piece with what in the bank says the reply. That there is no telling ends no reply."""
        try:
            found = job.model.sources_of(job.chosen, job.texts, job.reply.text) if job.chosen else None
        except HierMemError as error:
            log.warning("no sources: %s", error)
            return last
        return replace(last, sources=found)

    def _start_over(self, batch: MemoryBatch, error: Exception) -> None:
        """After a step that failed nothing is known of a batch's state: its sequences end, a new one goes on."""
        for key in [key for key in self._running if key[0] is batch]:
            self._post(self._running.pop(key), unexpected(error))
        with contextlib.suppress(Exception):
            batch.close()
        self._batches[id(batch.model.anchor)] = MemoryBatch(batch.model, self.max_batch)

    def _post(self, job: Job, event: Event) -> None:
        self._on_loop(self._deliver, job, event)

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        if self.loop:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self.loop.call_soon_threadsafe(function, *arguments)
