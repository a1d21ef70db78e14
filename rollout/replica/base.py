"""What a replica is to whoever drives one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from engine.protocol import (
    BeginUpdate,
    Command,
    ReplicaState,
    Reply,
    Request,
    RequestOutput,
    UpdateReport,
)


class Replica(Protocol):
    """One engine. Commands take effect in the order they are given, between steps."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. One that is refused comes back from `step` as a final output with
        finish type "abort", the error's class name and its message; it touches no other."""
        ...

    def step(self) -> list[RequestOutput]:
        """Advance, and return the outputs there are; may be empty."""
        ...

    def send(self, command: Command) -> Reply:
        """Run a control command. Raises the typed error of a command that failed, and
        EngineDead if the engine is gone or misses its deadline."""
        ...

    def state(self) -> ReplicaState:
        """What the replica is and does right now."""
        ...

    def idle(self) -> bool:
        """Whether every request submitted has had its final output."""
        ...

    def update_weights_inproc(
        self, begin: BeginUpdate, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False
    ) -> UpdateReport:
        """Update the weights from tensors of this process, as one transaction.

        lasting: the tensors stay as they are until this returns. Else each is read before the
        next is asked for.
        """
        ...

    def close(self) -> None:
        """Free everything. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
