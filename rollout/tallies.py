"""Counts and histograms that cost an addition, and become metrics of Prometheus when it asks.

Those of `prometheus_client` take a lock for every number they hold, which shows in what a short
request costs. These belong to one thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Tally(Collector):
    """How often each value of one label was counted."""

    def __init__(self, name: str, text: str, label: str) -> None:
        self._name, self._text, self._label = name, text, label
        self._counts: Counter[str] = Counter()

    def count(self, value: str) -> None:
        """Once more."""
        self._counts[value] += 1

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for every scrape, and once when it is registered."""
        family = CounterMetricFamily(self._name, self._text, labels=(self._label,))
        for value, count in self._counts.items():
            family.add_metric((value,), count)
        yield family


class Histogram(Collector):
    """Numbers by the first bound that they do not exceed. bounds: ascending."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text = name, text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One number more."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        """As `Tally.collect`."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric((), buckets=buckets, sum_value=self._sum)
        yield family
