"""What Prometheus reads at /metrics."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server, in a registry of their own; the gauges ask the engine when they are read."""

    def __init__(self, statistics: Callable[[], Any], model: str):
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
            "to_compile": "Programs that are still to be compiled; requests that need one wait for it",
        }.items():
            gauge = Gauge(f"nemoe_{name}", about, registry=self.registry)
            gauge.set_function(functools.partial(_figure, statistics, name))

        self.registry.register(_VllmNames(self, statistics, model))

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


class _VllmNames(Collector):
    """The figures that vLLM has as well, under its names, so that its dashboards show them."""

    def __init__(self, own: Metrics, statistics: Callable[[], Any], model: str):
        self.own, self.statistics, self.labels = own, statistics, {"model_name": model}

    def collect(self) -> Iterator[Metric]:
        now = self.statistics()
        gauges = {
            "num_requests_running": now.running,
            "num_requests_waiting": now.waiting,
            "kv_cache_usage_perc": 1 - now.free_tokens / now.tokens,
        }
        counters = {"prefix_cache_queries": now.prompt_tokens, "prefix_cache_hits": now.cached_tokens}
        for name, value in gauges.items():
            yield self._family(name, "gauge", [("", {}, value)])
        for name, value in counters.items():
            yield self._family(name, "counter", [("_total", {}, value)])
        same = {
            "prompt_tokens": self.own.prompt_tokens,
            "generation_tokens": self.own.answer_tokens,
            "time_to_first_token_seconds": self.own.first_token,
            "request_time_per_output_token_seconds": self.own.token,
        }
        for name, metric in same.items():
            (family,) = metric.collect()
            samples = [(one.name.removeprefix(family.name), one.labels, one.value) for one in family.samples]
            yield self._family(name, family.type, samples)
        (family,) = self.own.answers.collect()
        ended = [(one.labels["finish"], one.value) for one in family.samples if one.name.endswith("_total")]
        reasons = {"stop": "stop", "length": "length", "cancelled": "abort"}
        finished = [("_total", {"finished_reason": reasons[name]}, value) for name, value in ended if name in reasons]
        yield self._family("request_success", "counter", finished)

    def _family(self, name: str, kind: str, samples: list[tuple[str, dict[str, str], float]]) -> Metric:
        family = Metric(f"vllm:{name}", "As vLLM has it", kind)
        for suffix, labels, value in samples:
            if not suffix.endswith("_created"):
                family.add_sample(f"vllm:{name}{suffix}", {**labels, **self.labels}, value)
        return family


def _figure(statistics: Callable[[], Any], name: str) -> float:
    return float(getattr(statistics(), name))
