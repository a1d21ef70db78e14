"""What a router did, for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rollout.router.workers.worker import Worker

_PREFIX = "slipstream_router"


class RouterMetrics:
    """Counts of one router: plain numbers, which become Prometheus' when they are asked for, since
    a request changes several of them."""

    def __init__(self) -> None:
        self._replies: Counter[int] = Counter()
        self._choices: Counter[str] = Counter()
        self._controls: Counter[str] = Counter()
        self._plain: Counter[str] = Counter()

    def answered(self, status: int) -> None:
        """A reply went out."""
        self._replies[status] += 1

    def chose(self, reason: str, *, num_hit: int, size: int) -> None:
        """A worker was chosen. size: bytes of the prompt, of which `num_hit` should be cached."""
        self._choices[reason] += 1
        self._plain["prompt_bytes"] += size
        self._plain["predicted_hit_bytes"] += num_hit

    def noted(self, num_bytes: int) -> None:
        """A record came."""
        self._plain["journal_bytes"] += num_bytes

    def lost(self) -> None:
        """A worker was lost under a request."""
        self._plain["lost"] += 1

    def resumed(self) -> None:
        """Another one goes on."""
        self._plain["resumed"] += 1

    def retried(self) -> None:
        """A request was refused, and another worker is asked."""
        self._plain["retried"] += 1

    def parked(self) -> None:
        """A request waits for a worker."""
        self._plain["parked"] += 1

    def fanned_out(self, *, whole: bool) -> None:
        """A control call was made of all workers. whole: all of them took it."""
        self._controls["whole" if whole else "partly"] += 1

    def render(self, workers: Iterable[Worker]) -> bytes:
        """The text of /metrics."""
        registry = CollectorRegistry()
        registry.register(_Found([*self._counters(), *_gauges(workers)]))
        return generate_latest(registry)

    def _counters(self) -> Iterator[Metric]:
        for name, text, label, values in (
            ("replies", "Replies to clients.", "status", self._replies),
            ("choices", "Workers chosen, by reason.", "reason", self._choices),
            ("fan_outs", "Control calls.", "outcome", self._controls),
        ):
            family = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=[label])
            for value, count in values.items():
                family.add_metric([str(value)], count)
            yield family
        for name, text in _PLAIN:
            yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=self._plain[name])


_PLAIN = (
    ("prompt_bytes", "Bytes of prompts that were routed."),
    ("predicted_hit_bytes", "Of those, expected in a cache."),
    ("journal_bytes", "Bytes of journals that came."),
    ("lost", "Requests whose worker was lost."),
    ("resumed", "Requests that another worker went on with."),
    ("retried", "Requests asked again where one was refused."),
    ("parked", "Requests that had to wait for a worker."),
)


class _Found:
    """A collector of what was found."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _gauges(workers: Iterable[Worker]) -> Iterator[Metric]:
    opened = GaugeMetricFamily(
        f"{_PREFIX}_worker_open_requests", "Sequences on a worker.", labels=["worker"]
    )
    usable = GaugeMetricFamily(
        f"{_PREFIX}_worker_in_rotation", "1 for a worker that may be asked.", labels=["worker"]
    )
    for worker in workers:
        opened.add_metric([worker.url], worker.num_open)
        usable.add_metric([worker.url], worker.in_rotation)
    yield from (opened, usable)
