"""The replica of this process: the engine behind the interface, without another thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

from engine.config import EngineConfig
from engine.protocol import (
    BeginUpdate,
    Command,
    GetState,
    ReplicaState,
    Reply,
    Request,
    RequestOutput,
    UpdateReport,
)
from rollout.ranks.step_executor import StepExecutor
from rollout.replica.columns import from_columns
from rollout.replica.leader import Leader
from rollout.requests.message_ranges import check_ranges


class InlineReplica:
    """The engine in this process and thread: nothing happens outside `step` and `send`."""

    def __init__(self, config: EngineConfig, executor: StepExecutor) -> None:
        self._leader = Leader(config, executor)
        self._closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; refusals come back from `step`."""
        self._leader.submit(requests)

    def step(self) -> list[RequestOutput]:
        """Run one step of the engine."""
        return from_columns(self._leader.step())

    def send(self, command: Command) -> Reply:
        """Run a control command now; raises its typed error."""
        check_ranges(command)
        return self._leader.handle(command)

    def state(self) -> ReplicaState:
        """What the replica is and does right now."""
        reply = self._leader.handle(GetState())
        assert reply.state is not None
        return reply.state

    def idle(self) -> bool:
        """Whether nothing runs, waits or has yet to be returned."""
        return self._leader.idle()

    def update_weights_inproc(
        self, begin: BeginUpdate, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False
    ) -> UpdateReport:
        """Begin, receive and commit; an error aborts the update and is raised."""
        return self._leader.update_weights_inproc(begin, tensors, lasting=lasting)

    def close(self) -> None:
        """Free the engine. Idempotent."""
        if not self._closed:
            self._closed = True
            self._leader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
