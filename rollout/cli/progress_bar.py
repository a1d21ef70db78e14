"""Show how a batch goes: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from engine.protocol import ReplicaState
from rollout.replica.base import Replica
from rollout.requests.generate import Progress

logger = logging.getLogger(__name__)

_BAR_S = 0.5
_LOG_S = 10.0


class ProgressDisplay:
    """An `on_progress` callback, as a context manager.

    Shows requests done, output tokens a second, and the share of KV pages held by
    running sequences. Asks the replica for its state at most every half second.
    """

    def __init__(self, replica: Replica, *, terminal: bool | None = None) -> None:
        self._replica = replica
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._period_s = _BAR_S if self._terminal else _LOG_S
        state = replica.state()
        self._shown_at = time.monotonic()
        self._shown_tokens = state.num_output_tokens
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>8,.0f} tok/s  KV {task.fields[kv]:>4.0%}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not self._terminal,
        )
        self._task = self._bar.add_task("generate", total=None, rate=0.0, kv=kv_use(state))

    def __call__(self, progress: Progress) -> None:
        """Show `progress` if it is time to."""
        now = time.monotonic()
        last = progress.num_done == progress.num_requests
        if now - self._shown_at < self._period_s and not last:
            return
        state = self._replica.state()
        seconds = max(now - self._shown_at, 1e-9)
        rate = (state.num_output_tokens - self._shown_tokens) / seconds
        self._shown_at, self._shown_tokens = now, state.num_output_tokens
        self._show(progress, rate, kv_use(state))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _show(self, progress: Progress, rate: float, kv: float) -> None:
        if self._terminal:
            done, total = progress.num_done, progress.num_requests
            self._bar.update(self._task, completed=done, total=total, rate=rate, kv=kv)
            return
        logger.info(
            "%d of %d requests done, %.0f tokens/s, KV %.0f%% in use",
            progress.num_done,
            progress.num_requests,
            rate,
            100 * kv,
        )


def kv_use(state: ReplicaState) -> float:
    """Share of KV pages that are not free and not merely cached, in [0, 1]."""
    if state.total_pages == 0:
        return 0.0
    return max(0.0, 1 - (state.free_pages + state.cached_pages) / state.total_pages)
