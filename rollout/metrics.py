"""What Prometheus is told: requests as the server sees them, the engine's own counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.protocol import CopyLoad, ReplicaState
from rollout.http.vllm.metric_names import VllmNames
from rollout.tallies import Histogram, Tally

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2.5)
_TOKENS = (1, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_GAUGES = {
    "version": "Version of the weights that serve",
    "paused": "1 while the engine takes no steps",
    "num_running": "Sequences that are being decoded or prefilled",
    "num_waiting": "Sequences in the waiting queue",
    "free_pages": "KV pages that hold nothing",
    "cached_pages": "KV pages that hold only cached prefixes",
    "total_pages": "KV pages of the pool",
    "held_pages": "KV pages that idle sessions hold",
    "num_sessions": "Sessions that are open",
    "num_rollouts": "Captured rollouts that are open",
}
_COUNTERS = {
    "num_prompt_tokens": "Prompt tokens admitted",
    "num_cached_tokens": "Prompt tokens found in the prefix cache",
    "num_output_tokens": "Tokens sampled",
    "num_retractions": "Sequences sent back to the waiting queue",
    "num_steps": "Steps of the engine",
}


class _StateCollector(Collector):
    """The last `ReplicaState` as metrics, by our names and vLLM's."""

    def __init__(self, names: VllmNames) -> None:
        self.state: ReplicaState | None = None
        self._names = names

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for every scrape, and once when it is registered."""
        if self.state is None:
            return
        for name, text in _GAUGES.items():
            value = float(getattr(self.state, name))
            yield GaugeMetricFamily(f"slipstream_{name}", text, value)
        for name, text in _COUNTERS.items():
            total = getattr(self.state, name)
            yield CounterMetricFamily(f"slipstream_{name.removeprefix('num_')}", text, total)
        prompt = self.state.num_prompt_tokens
        rate = self.state.num_cached_tokens / prompt if prompt else 0.0
        yield GaugeMetricFamily("slipstream_cache_hit_rate", "Cached share of prompt tokens", rate)
        if self.state.drafter:
            yield from _of_drafter(self.state)
        if self.state.copies:
            yield from _of_copies(self.state.copies)
        yield from self._names.of_state(self.state)


def _of_copies(copies: Sequence[CopyLoad]) -> Iterator[Metric]:
    """What each copy of the model does, labelled with its number."""
    for name in CopyLoad.__struct_fields__:
        gauge = GaugeMetricFamily(f"slipstream_copy_{name}", _GAUGES[name], labels=("dp_rank",))
        for dp_rank, copy in enumerate(copies):
            gauge.add_metric((str(dp_rank),), float(getattr(copy, name)))
        yield gauge


def _of_drafter(state: ReplicaState) -> Iterator[Metric]:
    """What was drafted, labelled with what drafted it."""
    rows, accepted = state.num_verified_rows, state.num_accepted_tokens
    counters = {
        "verify_steps": ("Steps that verified drafts", state.num_verify_steps),
        "verified_rows": ("Sequences of those steps that had drafts", rows),
        "verified_tokens": ("Tokens that sequences with drafts got", rows + accepted),
        "drafted_tokens": ("Tokens drafted", state.num_drafted_tokens),
        "accepted_tokens": ("Drafted tokens that the model drew", accepted),
    }
    for name, (text, total) in counters.items():
        counter = CounterMetricFamily(f"slipstream_{name}", text, labels=("drafter",))
        counter.add_metric((state.drafter,), total)
        yield counter
    gauges = {"draft_len": ("Most drafts of a sequence in the last step", float(state.draft_len))}
    if rows:
        length = 1 + accepted / rows
        gauges["accept_length"] = ("Tokens of a sequence in a step that verified drafts", length)
    for name, (text, value) in gauges.items():
        gauge = GaugeMetricFamily(f"slipstream_{name}", text, labels=("drafter",))
        gauge.add_metric((state.drafter,), value)
        yield gauge


class _RequestNames(Collector):
    """Counts and histograms of requests once more, by vLLM's names."""

    def __init__(
        self, names: VllmNames, requests: Tally, histograms: Mapping[str, Histogram]
    ) -> None:
        self._names = names
        self._requests = requests
        self._histograms = histograms

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for every scrape, and once when it is registered."""
        yield from self._names.of_requests(self._requests)
        for name, source in self._histograms.items():
            yield from self._names.of_histogram(name, source)


class FinishedSequence(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted of a sequence. latency_s: from submit to its last token. queue_s: until it
    was first part of a step. first_s, decode_s: to its first token, and from there on; None if it
    had none."""

    reason: str
    latency_s: float
    queue_s: float
    first_s: float | None
    decode_s: float | None
    num_prompt: int
    num_output: int


class Metrics:
    """One server's metrics, in a registry of their own. model_name: as vLLM's label has it.

    report: called with every sequence, to be counted by another process; counted here without.
    """

    def __init__(
        self, model_name: str = "", *, report: Callable[[FinishedSequence], None] | None = None
    ) -> None:
        self._report = report or self.count
        names = VllmNames(model_name)
        self._registry = CollectorRegistry()
        self._state = _StateCollector(names)
        self._registry.register(self._state)
        self._requests = Tally("slipstream_requests", "Finished sequences", "reason")
        self._registry.register(self._requests)
        self._latency = self._histogram("request_seconds", "Submit to the last token", _SECONDS)
        self._first = self._histogram("first_token_seconds", "Submit to the first token", _SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt length", _TOKENS)
        self._output = self._histogram("request_output_tokens", "Output length", _TOKENS)
        self._updates = self._histogram("update_seconds", "Begin to commit", _SECONDS)
        self._decode = self._histogram("decode_seconds", "First to last token", _SECONDS)
        self._queue = self._histogram("queue_seconds", "Submit to the first step", _SECONDS)
        self._prefill = self._histogram("prefill_seconds", "First step to first token", _SECONDS)
        text = "Decode time of a sequence by its tokens behind the first"
        self._token = self._histogram("time_per_output_token_seconds", text, _TOKEN_SECONDS)
        histograms = {
            "vllm:e2e_request_latency_seconds": self._latency,
            "vllm:time_to_first_token_seconds": self._first,
            "vllm:request_decode_time_seconds": self._decode,
            "vllm:request_queue_time_seconds": self._queue,
            "vllm:request_prefill_time_seconds": self._prefill,
            "vllm:request_time_per_output_token_seconds": self._token,
            "vllm:request_prompt_tokens": self._prompt,
            "vllm:request_generation_tokens": self._output,
        }
        self._registry.register(_RequestNames(names, self._requests, histograms))

    def finished(
        self,
        reason: str,
        *,
        started_at: float,
        first_at: float,
        queue_s: float,
        num_prompt: int,
        num_output: int,
    ) -> None:
        """Count a sequence. Times are of `time.monotonic`; first_at 0 if it had no token."""
        now = time.monotonic()
        self._report(
            FinishedSequence(
                reason=reason,
                latency_s=now - started_at,
                queue_s=queue_s,
                first_s=first_at - started_at if first_at else None,
                decode_s=now - first_at if first_at else None,
                num_prompt=num_prompt,
                num_output=num_output,
            )
        )

    def count(self, found: FinishedSequence) -> None:
        """Count a sequence, of this process or of another."""
        self._requests.count(found.reason)
        self._latency.observe(found.latency_s)
        self._queue.observe(found.queue_s)
        if found.first_s is not None and found.decode_s is not None:
            self._first.observe(found.first_s)
            self._decode.observe(found.decode_s)
            self._prefill.observe(max(0.0, found.first_s - found.queue_s))
            if found.num_output > 1:
                self._token.observe(found.decode_s / (found.num_output - 1))
        self._prompt.observe(found.num_prompt)
        self._output.observe(found.num_output)

    def updated(self, seconds: float) -> None:
        """Count a committed weight update."""
        self._updates.observe(seconds)

    def render(self, state: ReplicaState) -> bytes:
        """The text format, with the engine's counts from `state`."""
        self._state.state = state
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"slipstream_{name}", text, buckets)
        self._registry.register(made)
        return made
