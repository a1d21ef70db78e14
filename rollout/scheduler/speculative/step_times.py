"""What a step costs: as measured on the host, or as a model says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median_low
from typing import Protocol

from engine.config import DRAFT_LADDER
from rollout.scheduler.speculative.ladder import row_bucket
from rollout.scheduler.speculative.verify_cost import CostModel

_NUM_SAMPLES = 16
_MAX_AGE = 1024
"""Steps after which a sample no longer counts where newer ones are there: contexts grow."""
_NUM_LATEST = 5
_KEPT_SAMPLES = 3
"""Of which this many stay, however old."""
_MIN_SAMPLES = 2
"""One alone may have met a hiccup; of two the smaller has not."""


class StepCosts(Protocol):
    """What the controller asks about costs, in a unit of the implementation's own."""

    measures: bool
    """Whether steps have to be tried to learn what they cost."""

    def planned(self, step: int, num_rows: int, k: int) -> None:
        """Step `step` was planned now, with k drafts for each of `num_rows` rows."""

    def observed(self, step: int) -> None:
        """Its result was applied now; or that of a step of which `planned` was not told."""

    def cost(self, num_rows: int, k: int) -> float:
        """What such a step is expected to cost; above 0."""

    def latest(self, num_rows: int, k: int) -> float:
        """What the last few of such steps did cost."""

    def known(self, num_rows: int, k: int) -> bool:
        """Whether that rests on steps like it."""


class ModelCosts:
    """Costs by a model alone: the same in every run."""

    measures = False

    def __init__(self, model: CostModel) -> None:
        self._model = model

    def planned(self, step: int, num_rows: int, k: int) -> None:
        """Nothing to note."""

    def observed(self, step: int) -> None:
        """Nothing to note."""

    def cost(self, num_rows: int, k: int) -> float:
        """In steps of one row."""
        return self._model.step(num_rows, k)

    def latest(self, num_rows: int, k: int) -> float:
        """In steps of one row."""
        return self._model.step(num_rows, k)

    def known(self, num_rows: int, k: int) -> bool:
        """A model knows all."""
        return True


@dataclass(kw_only=True)
class _Planned:
    num_rows: int
    k: int
    at: float
    tainted: bool


@dataclass
class _Samples:
    """times: (order, scale) of the last ones, scale being seconds over the model's cost, which
    takes the place of padding where a bucket is not padded. scale: their median, or 0 where they
    are too few to go by. latest: the median of the last five."""

    times: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_NUM_SAMPLES))
    scale: float = 0.0
    latest: float = 0.0

    def add(self, order: int, scale: float) -> None:
        self.times.append((order, scale))
        while len(self.times) > _KEPT_SAMPLES and self.times[0][0] < order - _MAX_AGE:
            self.times.popleft()
        if len(self.times) >= _MIN_SAMPLES:
            scales = [scale for _, scale in self.times]
            self.scale, self.latest = median_low(scales), median_low(scales[-_NUM_LATEST:])


class MeasuredCosts:
    """Median seconds of a step by bucket of rows and drafts.

    A step lasts from when it was planned, or the one before it was applied if that is later, until
    it is applied: with a plan ahead, the ranks take it up when they are done with the one before.
    A step whose forerunner was not seen here, such as one with a prompt in it, gives no sample;
    nor does the first of its kind, which captures a graph, nor those in flight meanwhile.

    Costs of kinds not seen yet are the model's, corrected by how far it was off at the kind
    nearest to it.
    """

    measures = True

    def __init__(self, model: CostModel, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._samples: dict[tuple[int, int], _Samples] = {}
        self._planned: dict[int, _Planned] = {}
        self._started: set[tuple[int, int]] = set()
        self._last_step, self._last_at = -1, 0.0
        self._order = 0

    def planned(self, step: int, num_rows: int, k: int) -> None:
        """See `StepCosts`; steps come in order."""
        kind = (row_bucket(num_rows), k)
        first = kind not in self._started
        if first:
            self._started.add(kind)
            for other in self._planned.values():
                other.tainted = True
        planned = _Planned(num_rows=num_rows, k=k, at=self._clock(), tainted=first)
        self._planned[step] = planned

    def observed(self, step: int) -> None:
        """See `StepCosts`; steps come in order, those that failed are left out."""
        now = self._clock()
        planned = self._planned.get(step)
        # Results come in order: what is older failed and has none.
        self._planned = {later: kept for later, kept in self._planned.items() if later > step}
        follows = self._last_step == step - 1
        before, self._last_step, self._last_at = self._last_at, step, now
        self._order += 1
        if planned is None or planned.tainted or not follows:
            return
        seconds = now - max(before, planned.at)
        if seconds <= 0:
            return
        kind = (row_bucket(planned.num_rows), planned.k)
        scale = seconds / self._model.step(planned.num_rows, planned.k)
        self._samples.setdefault(kind, _Samples()).add(self._order, scale)

    def cost(self, num_rows: int, k: int) -> float:
        """In seconds, once any step was measured."""
        bucket = row_bucket(num_rows)
        return self._model.step(num_rows, k) * self._scale(bucket, k)

    def latest(self, num_rows: int, k: int) -> float:
        """In seconds, as `cost`: it follows a change at once and is less sure, so that it says at
        most twice as much."""
        found = self._samples.get((row_bucket(num_rows), k))
        if found is None or not found.latest:
            return self.cost(num_rows, k)
        return self._model.step(num_rows, k) * min(found.latest, 2 * found.scale)

    def known(self, num_rows: int, k: int) -> bool:
        """Whether such a step was measured."""
        return self._measured(row_bucket(num_rows), k) > 0

    def _measured(self, bucket: int, k: int) -> float:
        """Seconds over the model's cost; 0 where that is not known."""
        found = self._samples.get((bucket, k))
        return 0.0 if found is None else found.scale

    def _scale(self, bucket: int, k: int) -> float:
        own = self._measured(bucket, k)
        if own > 0:
            return own
        if k == 0:
            return self._nearest_plain(bucket)
        return self._scale(bucket, 0) * self._correction(bucket, k)

    def _nearest_plain(self, bucket: int) -> float:
        plain = [rows for rows, k in self._samples if k == 0 and self._measured(rows, 0)]
        if not plain:
            return 1.0
        return self._measured(min(plain, key=lambda rows: _apart(rows, bucket)), 0)

    def _correction(self, bucket: int, k: int) -> float:
        """How many times more a verify step costs than the model says, a plain one being right."""
        verified = [
            (rows, other)
            for rows, other in self._samples
            if other and self._measured(rows, other) and self._measured(rows, 0)
        ]
        if not verified:
            return 1.0
        rung = DRAFT_LADDER.index(k)
        rows, other = min(
            verified,
            key=lambda kind: _apart(kind[0], bucket) + abs(DRAFT_LADDER.index(kind[1]) - rung),
        )
        return self._measured(rows, other) / self._measured(rows, 0)


def _apart(rows: int, other: int) -> float:
    """How different two buckets are: 1 for each doubling; at equal distance the larger is nearer,
    whose verify steps cost more."""
    return max(rows / other, other / rows) - (0.01 if rows > other else 0.0)
