"""The sending end of a complete group: rank 0 of a back end, every wait with a deadline.

Neither link is one of torch's registered groups, so no default group is needed or changed. For
NCCL it is not torch's group at all: that one's watchdog ends the process when a peer is lost,
and a trainer outlives its engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from engine.comm.nccl import Communicator, new_unique_id
from engine.comm.rendezvous import NCCL_ID_KEY
from kernels.torch_compat import Store

_POLL_S = 0.00005
_POLLS_BETWEEN_CHECKS = 500
_DROPPED = "the group was dropped"

Check = Callable[[], None]
"""Raises when the receivers have given up; what it raises ends the wait."""


class Link(Protocol):
    """Broadcasts to every other member. One thread uses it at a time."""

    def broadcast(self, tensor: torch.Tensor, check: Check) -> Any:
        """Queue the broadcast of a contiguous tensor behind the current stream's work.

        Returns its work. On a GPU `work.wait()` has the current stream wait for it, not the
        host. Raises as `wait` does.
        """
        ...

    def wait(self, work: Any, deadline: float, check: Check) -> None:
        """Wait on the host, until `deadline` (of time.monotonic) at most.

        Raises TimeoutError past it, RuntimeError when a member is gone, and what `check` raises;
        only `abort` may be called then.
        """
        ...

    def abort(self) -> None:
        """Drop the group at once, whatever is queued on it."""
        ...


class _GlooWork:
    """A broadcast over gloo, until it was waited for or its group was dropped."""

    def __init__(self, work: Any) -> None:
        self.work = work


class GlooLink:
    """Rank 0 over gloo."""

    def __init__(self, keys: Store, world_size: int, timeout_s: float) -> None:
        self._group: Any = dist.ProcessGroupGloo(keys, 0, world_size, timedelta(seconds=timeout_s))
        self._queued: list[_GlooWork] = []

    def broadcast(self, tensor: torch.Tensor, check: Check) -> _GlooWork:
        """See `Link`."""
        queued = _GlooWork(self._group.broadcast([tensor], dist.BroadcastOptions()))
        self._queued.append(queued)
        return queued

    def wait(self, work: _GlooWork, deadline: float, check: Check) -> None:
        """See `Link`. A member that goes breaks its connection, so nothing is left to check."""
        queued = work.work
        if queued is None:
            raise RuntimeError(_DROPPED)
        queued.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        if work.work is None:
            # Another thread dropped the group meanwhile: what came is not known of all members.
            raise RuntimeError(_DROPPED)
        work.work = None
        self._queued.remove(work)

    def abort(self) -> None:
        """See `Link`. Gloo's connections end with the last reference to the group, and every
        work holds one, wherever a caller's error still has it in its traceback."""
        for queued in self._queued:
            queued.work = None
        self._queued.clear()
        self._group = None


@dataclass(frozen=True)
class _Queued:
    """A broadcast on the link's stream; holds the memory that it reads."""

    done: torch.cuda.Event
    tensor: torch.Tensor

    def wait(self) -> None:
        torch.cuda.current_stream(self.tensor.device).wait_event(self.done)


class NcclLink:
    """Rank 0 over a NCCL communicator with a stream of its own.

    The communicator is built at the first broadcast, as torch's own groups do it: their ranks
    look for its id then, and the tensor says which GPU is meant.
    """

    def __init__(self, keys: Store, world_size: int, timeout_s: float) -> None:
        self._keys = keys
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._comm: Communicator | None = None
        self._stream: torch.cuda.Stream | None = None
        self._check: Check = lambda: None

    def broadcast(self, tensor: torch.Tensor, check: Check) -> _Queued:
        """See `Link`."""
        self._check = check
        deadline = time.monotonic() + self._timeout_s
        with torch.cuda.device(tensor.device):
            comm, stream = self._connect(deadline)
            stream.wait_stream(torch.cuda.current_stream())
            comm.broadcast(
                tensor.data_ptr(),
                tensor.nbytes,
                root=0,
                stream=stream.cuda_stream,
                deadline=deadline,
            )
            return _Queued(stream.record_event(), tensor)

    def wait(self, work: _Queued, deadline: float, check: Check) -> None:
        """See `Link`. Over NVLink a peer that died is not missed: `check` has to know of it."""
        polls = 0
        while not work.done.query():
            if time.monotonic() > deadline:
                raise TimeoutError("not received in time")
            polls += 1
            if polls % _POLLS_BETWEEN_CHECKS == 0:
                check()
                if self._comm is not None:
                    self._comm.poll()
            time.sleep(_POLL_S)

    def abort(self) -> None:
        """See `Link`."""
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()

    def _connect(self, deadline: float) -> tuple[Communicator, torch.cuda.Stream]:
        """The communicator and its stream on the current device; built by all ranks at once."""
        if self._comm is None or self._stream is None:
            unique_id = new_unique_id()
            self._keys.set(NCCL_ID_KEY, unique_id)  # type: ignore[arg-type]
            self._comm = Communicator(
                unique_id,
                rank=0,
                world_size=self._world_size,
                deadline=deadline,
                look=lambda: self._check(),
            )
            # Before the copies that pack the next bucket, which would take every processor.
            self._stream = torch.cuda.Stream(priority=-1)
        return self._comm, self._stream


def connect(backend: str, keys: Store, world_size: int, timeout_s: float) -> Link:
    """A link over `backend` ("nccl" or "gloo") once every member came; keys: of the back end."""
    link = NcclLink if backend == "nccl" else GlooLink
    return link(keys, world_size, timeout_s)
