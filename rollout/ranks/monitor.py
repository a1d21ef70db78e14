"""Notices a rank that died or does not come along, and frees the leader that waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine.errors import EngineDead, SlipstreamError
from rollout.ranks.board import StepBoard
from rollout.ranks.process import RankProcess

T = TypeVar("T")

_POLL_S = 0.1
_NOTICE_S = 2.0


@dataclass(frozen=True)
class _Due:
    """What the leader waits for, and until when. step: -1 for a command."""

    what: str
    step: int
    timeout_s: float
    at: float


class RankMonitor:
    """Watches the further ranks from a thread of its own.

    Rank 0 blocks in a collective that another rank does not join, and nothing in its thread
    can tell why. So this thread looks after the processes and the deadline; when either gives
    out, it kills the further ranks and calls `abort`, which must end rank 0's wait. From then
    on every guarded call raises the same EngineDead, which names the rank.
    """

    def __init__(
        self, ranks: Sequence[RankProcess], board: StepBoard, abort: Callable[[], None]
    ) -> None:
        self._ranks = ranks
        self._board = board
        self._abort = abort
        self._due: _Due | None = None
        self._awaited = ""
        self._failure: EngineDead | None = None
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank-monitor", daemon=True)
        self._thread.start()

    def guard(self, what: str, run: Callable[[], T], *, timeout_s: float, step: int = -1) -> T:
        """`run()`, which must end within `timeout_s`.

        Our errors other than EngineDead are refusals: every rank makes the same one before it
        changes anything. Any other error leaves the ranks apart, so it ends the replica.
        """
        self.require_alive()
        self._due = _Due(what, step, timeout_s, time.monotonic() + timeout_s)
        agreed = False
        try:
            result = run()
            agreed = True
        except EngineDead as error:
            raise self._explained(error) from error
        except SlipstreamError:
            agreed = True
            raise
        except RuntimeError as error:
            # Torch's own, which a rank's death may well cause.
            if self._failed.wait(_NOTICE_S) and self._failure is not None:
                raise self._failure from error
            raise
        finally:
            self._due, self._awaited = None, ""
            if not agreed:
                self._fail(EngineDead(f"rank 0 failed in {what}", field="rank 0"))
        # What an aborted collective left behind is no result.
        self.require_alive()
        return result

    def awaits(self, name: str) -> None:
        """The call that is guarded waits for the result of that rank."""
        self._awaited = name

    def fail(self, error: EngineDead) -> EngineDead:
        """End the replica; returns the error that it ended with, an earlier one if there was."""
        self._fail(error)
        assert self._failure is not None
        return self._failure

    @property
    def failure(self) -> EngineDead | None:
        """What the replica ended with, if it has."""
        return self._failure

    def require_alive(self) -> None:
        """Raise what the replica ended with, if it has."""
        if self._failure is not None:
            raise self._failure.copy()

    def stop(self) -> None:
        """Stop watching. Idempotent."""
        self._stopped.set()
        self._thread.join(_NOTICE_S)

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_S):
            error = self._dead() or self._missed()
            if error is not None:
                self._fail(error)
                return

    def _dead(self) -> EngineDead | None:
        for rank in self._ranks:
            if text := rank.exit_text():
                return rank.error(text)
        return None

    def _missed(self) -> EngineDead | None:
        due = self._due
        if due is None or time.monotonic() < due.at:
            return None
        if names := self._behind(due.step):
            why = f"{names} did not launch {due.what} within {due.timeout_s:g} s"
            return EngineDead(why, field=names)
        who = f" on {self._awaited}" if self._awaited else ""
        why = f"{due.what} did not end{who} within {due.timeout_s:g} s"
        return EngineDead(why, field=self._awaited or "ranks")

    def _explained(self, error: EngineDead) -> EngineDead:
        """The error if it names a rank, else what broke the collective: a rank that ended, as
        soon as this is known."""
        due, self._due = self._due, None
        if error.field.startswith("rank "):
            return self.fail(error)
        self._failed.wait(_NOTICE_S)
        if self._failure is None and due is not None:
            names = self._behind(due.step)
            message = f"{due.what}: {error.message}; behind: {names or 'nobody'}"
            error = EngineDead(message, field=names or error.field)
        return self.fail(error)

    def _behind(self, step: int) -> str:
        """The further ranks that have not launched `step`, whom rank 0 would wait for."""
        behind = self._board.behind(step)
        return ", ".join(rank.name for rank in self._ranks if rank.rank in behind)

    def _fail(self, error: EngineDead) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
        for rank in self._ranks:
            rank.kill()
        self._failed.set()
        self._abort()
