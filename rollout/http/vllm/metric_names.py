"""The names by which clients of vLLM look for what `rollout.metrics` counts.

prime-rl, dashboards and autoscalers read `vllm:*` with the label `engine`. The values are those of
the metrics of our own names, scraped in the same moment; what is not measured has no alias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.samples import Sample

from engine.protocol import ReplicaState
from rollout.tallies import Histogram, Tally

_ENGINE = "0"
_LABELS = ("engine", "model_name")
_COUNTERS: Mapping[str, str] = MappingProxyType(
    {
        "vllm:prompt_tokens": "num_prompt_tokens",
        "vllm:generation_tokens": "num_output_tokens",
        "vllm:prefix_cache_queries": "num_prompt_tokens",
        "vllm:prefix_cache_hits": "num_cached_tokens",
        "vllm:num_preemptions": "num_retractions",
    }
)
_OF_DRAFTS: Mapping[str, str] = MappingProxyType(
    {
        "vllm:spec_decode_num_drafts": "num_verified_rows",
        "vllm:spec_decode_num_draft_tokens": "num_drafted_tokens",
        "vllm:spec_decode_num_accepted_tokens": "num_accepted_tokens",
    }
)
"""Which vLLM has where something drafts."""
_GAUGES: Mapping[str, str] = MappingProxyType(
    {
        "vllm:num_requests_running": "num_running",
        "vllm:num_requests_waiting": "num_waiting",
    }
)


class VllmNames:
    """vLLM's names for the metrics of one server. model_name: what the label says."""

    def __init__(self, model_name: str) -> None:
        self._values = (_ENGINE, model_name)

    def of_state(self, state: ReplicaState) -> Iterator[Metric]:
        """Gauges and counters of the engine."""
        for name, field in _GAUGES.items():
            yield self._gauge(name, float(getattr(state, field)))
        used = state.total_pages - state.free_pages - state.cached_pages
        yield self._gauge("vllm:kv_cache_usage_perc", used / max(state.total_pages, 1))
        counters = {**_COUNTERS, **(_OF_DRAFTS if state.drafter else {})}
        for name, field in counters.items():
            family = CounterMetricFamily(name, f"slipstream's {field}", labels=_LABELS)
            family.add_metric(self._values, getattr(state, field))
            yield family

    def of_requests(self, requests: Tally) -> Iterator[Metric]:
        """Finished sequences, by the reason that `requests` has as its label."""
        labels = (*_LABELS, "finished_reason")
        family = CounterMetricFamily("vllm:request_success", "Finished sequences", labels=labels)
        for sample in _samples(requests):
            if sample.name.endswith("_total"):
                family.add_metric((*self._values, sample.labels["reason"]), sample.value)
        yield family

    def of_histogram(self, name: str, source: Histogram) -> Iterator[Metric]:
        """`source` once more, as `name`."""
        labels = dict(zip(_LABELS, self._values, strict=True))
        for family in source.collect():
            copy = Metric(name, family.documentation, "histogram")
            for sample in family.samples:
                suffix = sample.name.removeprefix(family.name)
                if suffix in ("_bucket", "_count", "_sum"):
                    copy.add_sample(name + suffix, {**labels, **sample.labels}, sample.value)
            yield copy

    def _gauge(self, name: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, name.removeprefix("vllm:"), labels=_LABELS)
        family.add_metric(self._values, value)
        return family


def _samples(source: Tally) -> Iterator[Sample]:
    for family in source.collect():
        yield from family.samples
