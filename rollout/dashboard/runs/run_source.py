"""The folder of a run, live or finished, as a source of the page."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import TypeVar

from msgspec import structs

from rollout.dashboard.figures import Chart, Event, EventsPage, SeriesPage, Snapshot, Tone
from rollout.dashboard.numbers import gap
from rollout.dashboard.rollouts import RolloutGroup, RolloutPage, RolloutQuery
from rollout.dashboard.runs.kept_rollouts import ROLLOUTS, SAMPLES
from rollout.dashboard.runs.rollout_index import RolloutIndex
from rollout.dashboard.runs.run_charts import charts_of, columns_of
from rollout.dashboard.runs.run_config import (
    config_stamp,
    is_over,
    is_running,
    read_config,
    require_run,
)
from rollout.dashboard.runs.run_events import events_of, seconds_of
from rollout.dashboard.runs.run_figures import figures_of
from rollout.dashboard.runs.run_rows import METRICS, RunRows

T = TypeVar("T")

PAGE_ROWS = 2000
_PERIOD_S = 0.25
"""Files are looked at no more often."""
_FEW = 200
"""Rows, or events, that are told without a thread."""
_STATE_S = 5.0
"""Nor whether the run goes on: the system's list of locks takes longer than all the rest."""


class RunSource:
    """A `rollout.dashboard.source.Source`. Raises InvalidRequest (`run`), naming the path, for a
    folder that is no run's. What a run has not written yet is left out."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        require_run(folder)
        self._folder = folder
        self._clock = clock
        self._began = f"{time.time_ns():x}"
        self._rows = RunRows(folder)
        self._columns: dict[str, None] = {}
        self._events: list[Event] = []
        self._taken = (0, 0)
        self._with_tokens = RolloutIndex(folder / ROLLOUTS)
        self._as_text = RolloutIndex(folder / SAMPLES)
        self._lock = Lock()
        self._looked_at = self._state_at = float("-inf")
        self._state: tuple[str, Tone] = ("", "plain")
        self._charts: list[Chart] = []
        self._snapshot_of: tuple[object, ...] = ()
        self._last_snapshot: Snapshot | None = None

    @property
    def epoch(self) -> str:
        """See `Source`."""
        return f"{self._began}-{self._rows.generation}"

    async def snapshot(self) -> Snapshot:
        """See `Source`."""
        return await self._in_thread(self._snapshot)

    async def series(self, since: int) -> SeriesPage:
        """See `Source`."""
        few = len(self._rows.rows) - since < _FEW
        return await self._in_thread(lambda: self._series(since), at_once=few)

    async def events(self, since: int) -> EventsPage:
        """See `Source`."""
        few = len(self._events) - since < _FEW
        return await self._in_thread(lambda: self._events_page(since), at_once=few)

    async def rollouts(self, query: RolloutQuery) -> RolloutPage:
        """See `Source`."""
        return await self._in_thread(lambda: self._index().page(query))

    async def rollout_group(self, group: str) -> RolloutGroup:
        """See `Source`."""
        return await self._in_thread(lambda: self._index().group(group))

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for each in (self._rows, self._with_tokens, self._as_text):
                each.close()

    async def _in_thread(self, work: Callable[[], T], *, at_once: bool = False) -> T:
        """What `work` gives, after a look at what is new. at_once: it takes no time, and needs no
        thread where the files were looked at just now."""
        if at_once and self._is_fresh() and self._lock.acquire(blocking=False):
            try:
                return work()
            finally:
                self._lock.release()

        def looked() -> T:
            with self._lock:
                self._refresh()
                return work()

        return await asyncio.to_thread(looked)

    def _refresh(self) -> None:
        if self._is_fresh():
            return
        now = self._looked_at = self._clock()
        self._rows.refresh()
        self._take_in()
        self._with_tokens.refresh()
        self._as_text.refresh()
        if now - self._state_at >= _STATE_S:
            self._state, self._state_at = self._look_at_state(), now

    def _is_fresh(self) -> bool:
        return self._clock() - self._looked_at < _PERIOD_S

    def _take_in(self) -> None:
        """The columns and events of rows that are new."""
        generation, num = self._taken
        if generation != self._rows.generation:
            self._columns, self._events, self._charts, num = {}, [], [], 0
        rows = self._rows.rows[num:]
        for row in rows:
            self._columns.update(dict.fromkeys(row.figures))
        if rows:
            self._charts = charts_of(self._columns)
            before = self._changed_at() - sum(map(seconds_of, rows))
            self._events += events_of(rows, before=before)
        self._taken = (self._rows.generation, len(self._rows.rows))

    def _index(self) -> RolloutIndex:
        """Of the file with tokens; of the other, where a run keeps none."""
        return self._with_tokens if len(self._with_tokens) else self._as_text

    def _snapshot(self) -> Snapshot:
        """Made anew only when something is new: a page asks once a second, beside a run."""
        of = (
            *(self._taken, self._rows.num_unread, len(self._index()), self._state),
            config_stamp(self._folder),
        )
        if self._last_snapshot is None or of != self._snapshot_of:
            self._last_snapshot, self._snapshot_of = self._new_snapshot(), of
        return structs.replace(self._last_snapshot, at=time.time())

    def _new_snapshot(self) -> Snapshot:
        config = read_config(self._folder)
        state, tone = self._state
        return Snapshot(
            title=config.name,
            kind="run",
            at=time.time(),
            state=state,
            tone=tone,
            model=config.model,
            x="step",
            figures=figures_of(self._rows.rows, config, self._rows.num_unread),
            charts=self._charts,
            rollouts=self._no_rollouts(config.samples_replies),
        )

    def _look_at_state(self) -> tuple[str, Tone]:
        if is_running(self._folder):
            return ("training", "good") if self._rows.rows else ("starting", "plain")
        return ("finished", "plain") if is_over(self._folder) else ("stopped", "warn")

    def _no_rollouts(self, samples_replies: bool) -> str:
        if len(self._index()):
            return ""
        if not samples_replies:
            return "A supervised run samples no replies."
        return "The run has kept no replies yet."

    def _series(self, since: int) -> SeriesPage:
        rows = self._rows.rows
        first = min(since, len(rows))
        page = rows[first : first + PAGE_ROWS]
        names = columns_of(self._charts)
        return SeriesPage(
            first=first,
            next=first + len(page),
            x=[row.step for row in page],
            columns={name: [gap(row.figures.get(name)) for row in page] for name in names},
            more=first + len(page) < len(rows),
        )

    def _events_page(self, since: int) -> EventsPage:
        first = min(since, len(self._events))
        page = self._events[first : first + PAGE_ROWS]
        after = first + len(page)
        return EventsPage(first=first, next=after, events=page, more=after < len(self._events))

    def _changed_at(self) -> float:
        try:
            return os.stat(self._folder / METRICS).st_mtime
        except OSError:
            return time.time()
