"""What Prometheus reads. Names that vLLM has keep their stem, behind ``diffulex:``; the rest is diffusion's own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diffulex_jax.async_serving.async_engine import AsyncEngine
from diffulex_jax.async_serving.protocol import Commit, Reply
from diffulex_jax.async_serving.supervisor import Health


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_PER_FORWARD = (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 32)


class EngineCollector(Collector):
    """Reads the engine's own counters when asked."""

    def __init__(self, engine: AsyncEngine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        supervisor = self._engine.supervisor
        stats = supervisor.stats
        held, pages = stats.get("pages_held", 0), stats.get("pages", 0)
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Outputs being decoded or prefilled.", stats.get("running", 0) + stats.get("prefilling", 0)),
            "num_requests_waiting": ("Outputs that wait for a slot or for pages.", stats.get("waiting", 0)),
            "num_requests_in_flight": ("Requests whose answer is not complete.", len(self._engine.in_flight)),
            "kv_cache_usage_perc": ("Share of pages that requests hold, 0 to 1.", held / pages if pages else 0.0),
            "kv_pages_used": ("Pages that requests hold.", held),
            "kv_pages_free": ("Pages that no request holds; the prefix cache may.", pages - held),
            "engine_up": ("1 while the engine can take requests.", supervisor.health is Health.READY),
        }
        counters: dict[str, tuple[str, float]] = {
            "prefix_cache_queries": ("Blocks looked up in the prefix cache.", stats.get("prefix_cache_queries", 0)),
            "prefix_cache_hits": ("Blocks found there.", stats.get("prefix_cache_hits", 0)),
            "num_preemptions": ("Outputs set aside because pages ran out.", stats.get("preemptions", 0)),
            "recompiles": ("Programs compiled since the engine was ready, but for the background; stays 0.", stats.get("recompiles", 0)),
            "engine_restarts": ("Engines started in place of one that was lost.", supervisor.restarts),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"diffulex:{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"diffulex:{name}", text, value=value)


class Metrics:
    """The server's counters and histograms, in a registry of their own."""

    def __init__(self, engine: AsyncEngine):
        self._engine = engine
        self.registry = registry = CollectorRegistry()
        registry.register(EngineCollector(engine))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"diffulex:{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS, *labels: str) -> Histogram:
            return Histogram(f"diffulex:{name}", text, labels, buckets=buckets, registry=registry)

        self.http_requests = counter("http_requests", "HTTP requests by route and status.", "route", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens of outputs.")
        self.success = counter("request_success", "Complete outputs by finish reason.", "finished_reason")
        self.denoise_steps = counter("denoise_steps", "Denoise steps (forwards), summed over outputs.")
        self.revised = counter("revised_tokens", "How often a filled token was changed.")
        self.remasked = counter("remasked_tokens", "How often a filled token was masked again.")
        self.nfe = histogram("nfe_per_request", "Denoise steps of an output.", _COUNTS, "strategy")
        self.per_forward = histogram("tokens_per_forward", "Tokens of an output for each of its denoise steps.", _PER_FORWARD, "strategy")
        self.first_block = histogram("time_to_first_block_seconds", "From arrival to the first committed text of a stream.")
        self.inter_block = histogram("inter_block_latency_seconds", "Between commits of a stream.")
        self.block_commit = histogram("block_commit_latency_seconds", "Time of a stream for each block it commits, after the first commit.")
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the complete output.")
        self.queue_time = histogram("request_queue_time_seconds", "From arrival until the output got a slot.")

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return int(self._engine.facts["block_size"])

    def page(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)


@dataclasses.dataclass
class Watch:
    """Times one request's events."""

    metrics: Metrics
    strategy: str
    clock: Callable[[], float] = time.monotonic
    began: float = 0.0
    committed_at: dict[int, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def commit(self, event: Commit) -> None:
        """A commit of one of its outputs."""
        now, before = self.clock(), self.committed_at.get(event.index)
        if before is None:
            self.metrics.first_block.observe(now - self.began)
        else:
            self.metrics.inter_block.observe(now - before)
            self.metrics.block_commit.observe((now - before) / max(1.0, len(event.token_ids) / self.metrics.block_size))
        self.committed_at[event.index] = now

    def reply(self, event: Reply) -> None:
        """The end of one of its outputs."""
        m, seconds = self.metrics, self.clock() - self.began
        m.success.labels(event.finish_reason).inc()
        m.generation_tokens.inc(len(event.token_ids))
        m.denoise_steps.inc(event.nfe)
        m.revised.inc(event.revised_tokens)
        m.remasked.inc(event.remasked_tokens)
        m.nfe.labels(self.strategy).observe(event.nfe)
        if event.nfe:
            m.per_forward.labels(self.strategy).observe(len(event.token_ids) / event.nfe)
        m.end_to_end.observe(seconds)
        m.queue_time.observe(max(0.0, seconds - event.seconds))
