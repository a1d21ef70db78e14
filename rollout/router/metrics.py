"""What a router did, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from rollout.router.workers.worker import Worker


class RouterMetrics:
    """Counters of one router, and gauges of its workers that are read when they are asked for."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._replies = self._counter("replies", "Replies to clients.", "status")
        self._choices = self._counter("choices", "Workers chosen, by reason.", "reason")
        self._prompt = self._counter("prompt_bytes", "Bytes of prompts that were routed.")
        self._hit = self._counter("predicted_hit_bytes", "Of those, expected in a cache.")
        self._lost = self._counter("lost", "Requests whose worker was lost.")
        self._resumed = self._counter("resumed", "Requests that another worker went on with.")
        self._retried = self._counter("retried", "Requests asked again where one was refused.")
        self._noted = self._counter("journal_bytes", "Bytes of journals that came.")
        self._parked = self._counter("parked", "Requests that had to wait for a worker.")
        self._controls = self._counter("fan_outs", "Control calls.", "outcome")
        self._open = self._gauge("worker_open_requests", "Requests on a worker.")
        self._usable = self._gauge("worker_in_rotation", "1 for a worker that may be asked.")
        self._by_status: dict[int, Counter] = {}

    def answered(self, status: int) -> None:
        """A reply went out."""
        child = self._by_status.get(status)
        if child is None:
            child = self._by_status[status] = self._replies.labels(str(status))
        child.inc()

    def chose(self, reason: str, *, num_hit: int, size: int) -> None:
        """A worker was chosen. size: bytes of the prompt, of which `num_hit` should be cached."""
        self._choices.labels(reason).inc()
        if size:
            self._prompt.inc(size)
            self._hit.inc(num_hit)

    def noted(self, num_bytes: int) -> None:
        """A record came."""
        self._noted.inc(num_bytes)

    def lost(self) -> None:
        """A worker was lost under a request."""
        self._lost.inc()

    def resumed(self) -> None:
        """Another one goes on."""
        self._resumed.inc()

    def retried(self) -> None:
        """A request was refused, and another worker is asked."""
        self._retried.inc()

    def parked(self) -> None:
        """A request waits for a worker."""
        self._parked.inc()

    def fanned_out(self, *, whole: bool) -> None:
        """A control call was made of all workers. whole: all of them took it."""
        self._controls.labels("whole" if whole else "partly").inc()

    def render(self, workers: Iterable[Worker]) -> bytes:
        """The text of /metrics."""
        for gauge in (self._open, self._usable):
            gauge.clear()
        for worker in workers:
            self._open.labels(worker.url).set(worker.num_open)
            self._usable.labels(worker.url).set(worker.in_rotation)
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"slipstream_router_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"slipstream_router_{name}", text, ["worker"], registry=self._registry)
