"""The pause that waits until everything that runs has finished."""

from __future__ import annotations

import asyncio
import time

from engine.errors import InvalidRequest, PauseCancelled, UpdateTimeout
from engine.protocol import GetState, Pause
from rollout.http.engine.client import AsyncEngine

_POLL_S = 0.02


class _Wait:
    """One call that waits. ended_by: what took the pause from it."""

    ended_by = ""


class IdlePause:
    """At most one call waits at a time; any other pause, and a resume, end its wait.

    It holds no lock while it waits. Requests that come meanwhile are held in the server and
    sent once the engine is paused, or the wait is over.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._wait: _Wait | None = None

    @property
    def waiting(self) -> bool:
        """Whether a pause is on its way."""
        return self._wait is not None

    async def pause(self, timeout_s: float) -> None:
        """Pause once nothing runs, within `timeout_s`.

        Raises UpdateTimeout when something still runs then, PauseCancelled when a resume or
        another pause came first, InvalidRequest when what is open cannot finish at all.
        """
        self.cancel("another pause by mode wait")
        wait = self._wait = _Wait()
        # Before anything is awaited: what comes after this call waits for the resume.
        self._engine.outbox.hold()
        try:
            if not await self._stands_still():
                await self._until_idle(wait, timeout_s)
            await self._engine.send(Pause(mode="keep"))
        finally:
            if self._wait is wait:
                self._wait = None
            self.release()

    def cancel(self, by: str) -> None:
        """End the wait of the call that waits, which says so to its caller."""
        if self._wait is not None:
            self._wait.ended_by, self._wait = by, None

    def release(self) -> None:
        """Send what was held, unless a call still waits. Idempotent."""
        if self._wait is None:
            self._engine.outbox.release()

    async def _stands_still(self) -> bool:
        """Whether nothing runs, and nothing that waits may begin."""
        state = (await self._engine.send(GetState())).state
        assert state is not None
        if not state.paused and not state.released:
            return False
        if state.num_running:
            why = f"paused by mode {state.pause_mode}" if state.paused else "without its memory"
            raise InvalidRequest(
                f"generation is {why} with {state.num_running} requests in it, which cannot "
                "finish; resume first, or pause by mode abort",
                field="mode",
            )
        return True

    async def _until_idle(self, wait: _Wait, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            if wait.ended_by:
                raise PauseCancelled(
                    f"{wait.ended_by} came before the last of {self._engine.num_open} requests "
                    "had finished",
                    field="mode",
                )
            # What other processes sent is known to the engine alone, which is asked.
            if (self._engine.shared or not self._engine.num_open) and await self._stands():
                return
            if time.monotonic() > deadline:
                raise UpdateTimeout(
                    f"{self._engine.num_open} requests still run after {timeout_s:g} s; pause "
                    "by mode keep or abort",
                    field="mode",
                )
            await asyncio.sleep(_POLL_S)

    async def _stands(self) -> bool:
        """Whether the engine has no request of anybody."""
        state = (await self._engine.send(GetState())).state
        assert state is not None
        return not (state.num_running or state.num_waiting or self._engine.num_open)
