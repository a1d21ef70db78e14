"""What a process group with a trainer must do for the receiving end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from engine.errors import GroupError, UpdateTimeout, WeightUpdateError
from engine.weights.lane import Look


class Group(Protocol):
    """Broadcasts from a rank outside this engine, or messages from several. One thread uses it at
    a time.

    look: called now and then while it waits; what it raises ends the wait, and the group
    cannot be used again. lands: whether messages may arrive in any memory, live weights included:
    nothing is written any more once `abort` says so. Else they need memory of `empty`.
    """

    name: str
    look: Look
    lands: bool

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Memory that `broadcast` may receive into: uint8 [num_bytes]."""
        ...

    def broadcast(self, buffer: torch.Tensor, source: int, deadline: float, tensor: str) -> Any:
        """Start receiving `buffer` from rank `source`; returns a ticket for `wait`.

        On a GPU it is queued behind the work of the current stream. tensor: named in errors.
        deadline: of time.monotonic. Raises as `wait` does.
        """
        ...

    def receive(
        self, messages: Sequence[tuple[torch.Tensor, int]], deadline: float, tensor: str
    ) -> Any:
        """Start receiving what ranks send to this one alone, all at once: contiguous memory and
        the rank whose message it is, those of one rank in the order in which it sends them.

        Of groups with `JoinGroup.senders`. Otherwise like `broadcast`.
        """
        ...

    def wait(self, ticket: Any, deadline: float) -> None:
        """Wait on the host until a broadcast, or all messages of a ticket, are done.

        Raises UpdateTimeout past the deadline and GroupError when the group is broken. It
        cannot be used again after either.
        """
        ...

    def is_alive(self) -> bool:
        """Whether the trainer that formed the group still answers; True if that is not known."""
        ...

    def abort(self) -> bool:
        """Drop the group at once, whatever is queued on it; whether nothing writes into the
        memory of its broadcasts any more. Idempotent: asked again, it looks again."""
        ...


def broken(
    group: str, source: int, tensor: str, cause: Exception, *, late: bool
) -> WeightUpdateError:
    """The error of a broadcast from rank `source` that did not come: out of time, or `cause`."""
    if late:
        return UpdateTimeout(
            f"{tensor} did not come from rank {source} of group {group!r} in time", field=tensor
        )
    return GroupError(
        f"rank {source} of group {group!r} is gone; {tensor} did not come ({cause})", field=tensor
    )


def seconds_left(deadline: float) -> float:
    """Until `deadline` (of time.monotonic), a millisecond at least: a wait of 0 means none."""
    return max(deadline - time.monotonic(), 0.001)
