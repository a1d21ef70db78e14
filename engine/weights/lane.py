"""Threads of their own for what waits for somebody else: transfers, and forming groups.

A rank's steps run in one thread; nothing that a peer can hold up runs there. Transfers, which
feed the open update, run one after another on one thread and stream (`Lane`); joining and
leaving groups touches no update, and gets a thread a command (`Crew`), so that one silent peer
keeps no other waiting.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

from engine.errors import GroupError, WeightUpdateError
from engine.protocol import EngineCommand, JoinGroup, Reply

Look = Callable[[], None]
"""Called now and then by whatever waits; what it raises ends the wait."""
Run = Callable[[Look], Reply]
Which = Callable[[EngineCommand], bool]

_POLL_S = 0.001
MOST_AT_ONCE = 16
"""Groups that may be forming at a time; another one ends the oldest."""
_MOST_ENDING = 64
"""Threads of commands that were told to end and have not."""


def every(_command: EngineCommand) -> bool:
    """All commands."""
    return True


class PendingCommand:
    """A command on a thread of its own: its reply or its error, once there is one."""

    def __init__(self, command: EngineCommand) -> None:
        self.command = command
        self._future: Future[Reply] = Future()
        self._given_up = ""

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self._future.done()

    def result(self) -> Reply:
        """The reply; raises the command's error."""
        return self._future.result()

    def wait(self, timeout_s: float, look: Look) -> bool:
        """Wait for its end, good or bad; whether it came in time."""
        deadline = time.monotonic() + timeout_s
        while not self.done() and time.monotonic() < deadline:
            look()
            time.sleep(_POLL_S)
        return self.done()

    @property
    def cancelled(self) -> bool:
        """Whether it has been told to end."""
        return bool(self._given_up)

    def cancel(self, reason: str) -> None:
        """Have it end at the next look. One that is about to end well still may."""
        self._given_up = reason

    def look(self) -> None:
        """Raise WeightUpdateError if it was cancelled."""
        if self._given_up:
            raise WeightUpdateError(self._given_up, field="cancelled")

    def run(self, run: Run) -> None:
        """Run it here. What it raises is the caller's of `result` to see."""
        try:
            reply = run(self.look)
        except BaseException as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(reply)


class Lane:
    """One thread, and on a GPU one stream, that runs commands in order. device: with its number."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queue: queue.SimpleQueue[tuple[PendingCommand, Run] | None] = queue.SimpleQueue()
        self._open: list[PendingCommand] = []
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None

    def start(self, command: EngineCommand, run: Run) -> PendingCommand:
        """Queue `run`, which is given what to call while it waits; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name="weights-lane", daemon=True)
            self._thread.start()
        pending = PendingCommand(command)
        self._open = [other for other in self._open if not other.done()]
        self._open.append(pending)
        self._queue.put((pending, run))
        return pending

    def cancel(self, reason: str, which: Which = every) -> list[PendingCommand]:
        """Have the commands that `which` names end early, those that wait as well; returns
        them. They are run all the same, since other ranks may have begun theirs and wait for
        this one."""
        return _cancel(self._open, reason, which)

    def close(self, timeout_s: float) -> bool:
        """Cancel everything and end the thread; whether it ended in time. Idempotent."""
        self.cancel("the engine is closing")
        if self._thread is None:
            return True
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        while (entry := self._queue.get()) is not None:
            pending, run = entry
            # All that can fail is inside, or nobody would answer this command and the next.
            pending.run(lambda look, run=run: self._on_stream(run, look))  # type: ignore[misc]

    def _on_stream(self, run: Run, look: Look) -> Reply:
        """Run, and wait for what it queued: the step thread's stream reads it next."""
        if self._device.type != "cuda":
            return run(look)
        if self._stream is None:
            torch.cuda.set_device(self._device)
            self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            try:
                return run(look)
            finally:
                self._stream.synchronize()


class Crew:
    """A thread a command. Where `MOST_AT_ONCE` wait for their peers, the one that has waited
    longest is ended for the next: peers that say nothing keep nobody out."""

    def __init__(self) -> None:
        self._open: list[PendingCommand] = []

    def start(self, command: EngineCommand, run: Run) -> PendingCommand:
        """Run `run` beside everything else; returns at once."""
        pending = PendingCommand(command)
        self._open = [other for other in self._open if not other.done()]
        waiting = [
            other
            for other in self._open
            if isinstance(other.command, JoinGroup) and not other.cancelled
        ]
        for oldest in waiting[: max(0, len(waiting) + 1 - MOST_AT_ONCE)]:
            oldest.cancel(f"{MOST_AT_ONCE} groups are forming, of which this one is the oldest")
        if len(self._open) >= MOST_AT_ONCE + _MOST_ENDING:
            refusal = GroupError(
                f"{len(self._open)} groups were given up and have not ended; wait for them",
                field="name",
            )
            pending.run(lambda _look: _raise(refusal))
            return pending
        self._open.append(pending)
        thread = threading.Thread(
            target=pending.run, args=(run,), name="weights-group", daemon=True
        )
        thread.start()
        return pending

    def cancel(self, reason: str, which: Which = every) -> list[PendingCommand]:
        """Have the commands that `which` names end early; returns them."""
        return _cancel(self._open, reason, which)


def _cancel(found: list[PendingCommand], reason: str, which: Which) -> list[PendingCommand]:
    named = [pending for pending in found if not pending.done() and which(pending.command)]
    for pending in named:
        pending.cancel(reason)
    return named


def _raise(error: Exception) -> Reply:
    raise error
