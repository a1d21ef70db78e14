"""What an engine has said of itself, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from engine.errors import QueueFull
from engine.protocol import Command, CommitUpdate, ReplicaState, Reply, SetVersion

Listener = Callable[[Command, Reply], None]
"""Called with every command that was answered, and the answer."""


class LastHeard:
    """Kept by `AsyncEngine` from the replies that arrive. Times are of `time.monotonic`.

    state: the last one heard, at `state_at`. heard_at: when anything came. progress_at: when a
    step or an output came. version: the last one committed, or given to the weights by name.
    took_update: whether an update was committed. no_version: why what the engine loaded may not
    serve, "" if it may. listeners: are told of every reply.
    """

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = listeners
        self.state: ReplicaState | None = None
        self.state_at = 0.0
        self.version = 0
        self.took_update = False
        self.no_version = ""
        self.renewed()

    def renewed(self, no_version: str = "") -> None:
        """The engine that answers from now on is another one."""
        self.no_version = no_version
        self.heard_at = self.progress_at = time.monotonic()

    @property
    def facts(self) -> ReplicaState:
        """The last state heard."""
        assert self.state is not None, "start() has not finished"
        return self.state

    @property
    def may_wait(self) -> bool:
        """Whether requests that see no step are only doing what they were told to."""
        return self.state is None or self.state.paused or bool(self.state.refusal)

    @property
    def num_unfinished(self) -> int:
        """Requests that the engine had, whoever sent them."""
        return 0 if self.state is None else self.state.num_running + self.state.num_waiting

    def stalled_s(self, *, beyond: float) -> float:
        """For how long requests that may run have seen no step; 0.0 if not longer than `beyond`."""
        stalled_s = 0.0 if self.may_wait else time.monotonic() - self.progress_at
        return stalled_s if stalled_s > beyond else 0.0

    def check_room(self, num_sent: int, count: int) -> None:
        """Raise QueueFull if `count` sequences cannot wait beside those that were sent."""
        facts = self.facts
        num_waiting = max(0, num_sent - facts.max_running)
        if num_waiting + count > facts.max_waiting:
            raise QueueFull(
                f"{num_waiting} sequences wait, at most {facts.max_waiting} may, and {count} "
                "would join them; try again later",
                field="queue",
            )

    def learn(self, command: Command, reply: Reply, *, starting: bool) -> None:
        """Note what a reply says of the engine as a whole. starting: it is not ready yet."""
        for listener in self._listeners:
            listener(command, reply)
        if reply.error is None and isinstance(command, CommitUpdate | SetVersion):
            self.version = command.version
            self.took_update = self.took_update or isinstance(command, CommitUpdate)
        if reply.state is None:
            # Any other command may have changed what was known.
            self.state_at = 0.0
            return
        old, was_idle = self.state, not self.num_unfinished
        self.state, self.state_at = reply.state, self.heard_at
        # Those that came since then have not waited for longer than that.
        if old is None or was_idle or old.num_steps != reply.state.num_steps:
            self.progress_at = self.heard_at
        if not reply.state.refusal and not starting:
            self.no_version = ""
