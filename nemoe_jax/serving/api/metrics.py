"""What Prometheus reads at /metrics."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server, in a registry of their own; the gauges ask the engine when they are read."""

    def __init__(self, statistics: Callable[[], Any]):
        self.registry = CollectorRegistry()
        self.requests = Counter("nemoe_requests", "HTTP requests", ["path", "method", "status"], registry=self.registry)
        self.answers = Counter("nemoe_answers", "Answers by how they ended", ["finish"], registry=self.registry)
        self.prompt_tokens = Counter("nemoe_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.answer_tokens = Counter("nemoe_answer_tokens", "Tokens of answers", registry=self.registry)
        self.first_token = Histogram(
            "nemoe_first_token_seconds",
            "From the request to its first token",
            buckets=FIRST_TOKEN_SECONDS,
            registry=self.registry,
        )
        self.token = Histogram(
            "nemoe_token_seconds",
            "Time per token after an answer's first, a mean over each answer",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_PrefixCache(statistics))
        for name, about in {
            "running": "Requests that are being answered",
            "waiting": "Requests that wait for a row",
            "free_tokens": "Tokens that the cache has room for",
        }.items():
            gauge = Gauge(f"nemoe_{name}", about, registry=self.registry)
            gauge.set_function(functools.partial(_figure, statistics, name))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class _PrefixCache(Collector):
    """What the prefix cache has saved, as the engine counts it."""

    def __init__(self, statistics: Callable[[], Any]):
        self.statistics = statistics

    def collect(self) -> Iterator[CounterMetricFamily]:
        about = "Tokens of prompts that were in the KV cache already"
        yield CounterMetricFamily("nemoe_cached_prompt_tokens", about, value=self.statistics().cached_tokens)


def _figure(statistics: Callable[[], Any], name: str) -> float:
    return float(getattr(statistics(), name))
