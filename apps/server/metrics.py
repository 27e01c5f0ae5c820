"""/metrics for Prometheus: requests, tokens and times are counted here, the rest is read where it is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.refusal import GONE

SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One server's; also the ASGI middleware's place to count requests."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hiermem_requests",
            "Requests answered; 499 is a client that left.",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "hiermem_request_seconds",
            "From a request to its answer's end.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "hiermem_first_token_seconds",
            "From a request to its first text.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prompt = Counter("hiermem_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.cached = Counter(
            "hiermem_cached_prompt_tokens", "Those of them not computed again.", registry=self.registry
        )
        self.generated = Counter("hiermem_generated_tokens", "Tokens of replies.", registry=self.registry)
        self.registry.register(EngineFigures(engine))

    def count_tokens(self, prompt: int, cached: int, generated: int) -> None:
        self.prompt.inc(prompt)
        self.cached.inc(cached)
        self.generated.inc(generated)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)


class EngineFigures:
    """The engine's queue and its block cache, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self.engine
        yield GaugeMetricFamily("hiermem_queued_sequences", "Waiting for room or for memory.", engine.queued)
        yield GaugeMetricFamily("hiermem_active_sequences", "Decoded now.", engine.active)
        caches = [model.cache for model in engine.models.values() if model.cache]
        if not caches:
            return
        stats, remotes = [cache.stats for cache in caches], [cache.bank.remote for cache in caches]
        for name, meaning, value in (
            ("hits", "Blocks found in memory.", sum(each.hits for each in stats)),
            ("misses", "Blocks read from disk.", sum(each.misses for each in stats)),
            ("evictions", "Blocks that had to leave memory.", sum(each.evictions for each in stats)),
            ("read_bytes", "Read from disk.", sum(each.bytes_read for each in stats)),
        ):
            yield CounterMetricFamily(f"hiermem_cache_{name}", meaning, value)
        remote_bytes = sum(remote.bytes for remote in remotes if remote)
        yield CounterMetricFamily("hiermem_remote_bytes", "Fetched from the hub.", remote_bytes)
        yield GaugeMetricFamily("hiermem_cache_resident_bytes", "Blocks in memory.", sum(c.bytes for c in caches))
        yield GaugeMetricFamily(
            "hiermem_cache_budget_bytes", "The most they may take.", sum(c.budget for c in caches)
        )


class Counting:
    """Middleware: counts each request by route and status, and takes its time."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, start = GONE, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = _route(scope)
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)


def _route(scope: Scope) -> str:
    """The path of the route that was taken, or refused; of others none, or a client could fill the memory."""
    if route := scope.get("route"):
        return str(route.path)
    known = {getattr(route, "path", "") for route in scope["app"].routes}
    return scope["path"] if scope["path"] in known else "other"
