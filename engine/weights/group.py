"""What a process group with a trainer must do for the receiving end."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Group(Protocol):
    """Broadcasts from a rank outside this engine. One thread uses it at a time."""

    name: str

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Memory that `broadcast` may receive into: uint8 [num_bytes]."""
        ...

    def broadcast(self, buffer: torch.Tensor, source: int, deadline: float, tensor: str) -> Any:
        """Start receiving `buffer` from rank `source`; returns a ticket for `wait`.

        On a GPU it is queued behind the work of the current stream. tensor: named in errors.
        deadline: of time.monotonic. Raises as `wait` does.
        """
        ...

    def wait(self, ticket: Any, deadline: float) -> None:
        """Wait on the host until a broadcast is done.

        Raises UpdateTimeout past the deadline and GroupError when the group is broken. It
        cannot be used again after either.
        """
        ...

    def is_alive(self) -> bool:
        """Whether the trainer that formed the group still answers; True if that is not known."""
        ...

    def abort(self) -> bool:
        """Drop the group at once, whatever is queued on it; whether nothing of it can write to
        its buffers any more. Idempotent."""
        ...


def seconds_left(deadline: float) -> float:
    """Until `deadline` (of time.monotonic), a millisecond at least: a wait of 0 means none."""
    return max(deadline - time.monotonic(), 0.001)
