"""Calls into C++ that cannot be interrupted, made in threads that can be left behind.

A store's client waits for a peer that says nothing without regard to any timeout. Nobody who
must come back calls it: a helper does, and whoever waits for the helper gives up in time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from engine.errors import GroupError
from engine.weights.lane import Look

T = TypeVar("T")

MOST_LEFT = 32
"""Helpers that may be stuck at a time; then nobody new is called until one comes back."""
_POLL_S = 0.005


def nothing() -> None:
    """The look of a caller that is never cancelled."""


class Helpers:
    """Makes such calls, and counts the threads that have not come back. Thread-safe."""

    def __init__(self) -> None:
        self._left: list[threading.Thread] = []
        self._lock = threading.Lock()

    @property
    def num_left(self) -> int:
        """Helpers still stuck in a call that was given up."""
        with self._lock:
            self._left = [thread for thread in self._left if thread.is_alive()]
            return len(self._left)

    def call(
        self,
        run: Callable[[], T],
        deadline: float,
        look: Look = nothing,
        *,
        discard: Callable[[Any], object] = lambda _result: None,
    ) -> T:
        """`run()`, or its error, by `deadline` (of time.monotonic).

        Raises TimeoutError past it, what `look` raises, and GroupError when too many helpers
        are stuck. discard: called with a result that comes when nobody waits for it any more.
        """
        if self.num_left >= MOST_LEFT:
            raise GroupError(
                f"{MOST_LEFT} peers were called that never answered; nobody new is called until "
                "one of them does or goes away",
                field="address",
            )
        call: _Call[T] = _Call(run, discard)
        thread = threading.Thread(target=call.run, name="weights-helper", daemon=True)
        thread.start()
        waits = True
        try:
            while not call.ended.wait(_POLL_S):
                look()
                if time.monotonic() > deadline:
                    raise TimeoutError
            waits = False
        finally:
            if waits:
                call.abandon()
                with self._lock:
                    self._left.append(thread)
        return call.result()


class _Call(Generic[T]):
    """One call: what it came to, unless it was abandoned."""

    def __init__(self, run: Callable[[], T], discard: Callable[[Any], object]) -> None:
        self.ended = threading.Event()
        self._run = run
        self._discard = discard
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._abandoned = False
        self._lock = threading.Lock()

    def run(self) -> None:
        try:
            result = self._run()
        except BaseException as error:
            self._error = error
        else:
            with self._lock:
                late = self._abandoned
                if not late:
                    self._result.append(result)
            if late:
                self._discard(result)
        self.ended.set()

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            came = self._result
            self._result = []
        for result in came:
            self._discard(result)

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._result[0]
