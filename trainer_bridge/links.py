"""The sending end of a complete group: a trainer rank of a back end, every wait with a deadline.

Neither link is one of torch's registered groups, so no default group is needed or changed. For
NCCL it is not torch's group at all: that one's watchdog ends the process when a peer is lost,
and a trainer outlives its engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from engine.comm.nccl import Communicator, new_unique_id
from engine.comm.rendezvous import NCCL_ID_KEY, pair_prefix
from kernels.torch_compat import PrefixStore, Store

_POLL_S = 0.00005
_ASK_S = 0.002
_POLLS_BETWEEN_CHECKS = 500
_DROPPED = "the group was dropped"

Check = Callable[[], None]
"""Raises when the receivers have given up; what it raises ends the wait."""

Outgoing = tuple[torch.Tensor, int]
"""A contiguous tensor, and the rank of the group that it is for."""


class Link(Protocol):
    """Broadcasts to every other member, or messages to single ones. One thread uses it at a
    time."""

    def broadcast(self, tensor: torch.Tensor, check: Check) -> Any:
        """Queue the broadcast of a contiguous tensor behind the current stream's work.

        Returns its work. On a GPU `work.wait()` has the current stream wait for it, not the
        host. Raises as `wait` does.
        """
        ...

    def send(self, messages: Sequence[Outgoing], check: Check) -> Any:
        """Queue messages, all at once, in a group with `senders`; otherwise like `broadcast`."""
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
        self._queued: set[_GlooWork] = set()

    def broadcast(self, tensor: torch.Tensor, check: Check) -> _GlooWork:
        """See `Link`."""
        group = self._group
        if group is None:
            # By another thread, between two messages.
            raise RuntimeError(_DROPPED)
        try:
            queued = _GlooWork(group.broadcast([tensor], dist.BroadcastOptions()))
        finally:
            # The traceback of an error would keep the connections open.
            del group
        self._queued.add(queued)
        if self._group is None:
            # Dropped while this was queued: `abort` may not have seen it, and it holds the group.
            queued.work = None
            raise RuntimeError(_DROPPED)
        return queued

    def send(self, messages: Sequence[Outgoing], check: Check) -> Any:
        """See `Link`: `GlooPairLinks` does."""
        raise RuntimeError("the group was formed for broadcasts")

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
        self._queued.discard(work)

    def poll(self, work: _GlooWork) -> bool:
        """Whether `wait` would not wait."""
        return work.work is None or work.work.is_completed()

    def abort(self) -> None:
        """See `Link`. Gloo's connections end with the last reference to the group, and every
        work holds one, wherever a caller's error still has it in its traceback."""
        # First: what is queued from now on sees it.
        self._group = None
        for queued in list(self._queued):
            queued.work = None
        self._queued.clear()


class GlooPairLinks:
    """Trainer rank `rank` over gloo, with a group of two for each engine rank, in which a
    broadcast is a message: ranks `senders` to `world_size` - 1 are engines'."""

    def __init__(
        self, keys: Store, rank: int, senders: int, world_size: int, timeout_s: float
    ) -> None:
        self._links = {
            other: GlooLink(PrefixStore(pair_prefix(rank, other), keys), 2, timeout_s)
            for other in range(senders, world_size)
        }

    def broadcast(self, tensor: torch.Tensor, check: Check) -> Any:
        """See `Link`: `GlooLink` does."""
        raise RuntimeError("the group was formed for messages")

    def send(self, messages: Sequence[Outgoing], check: Check) -> list[tuple[GlooLink, _GlooWork]]:
        """See `Link`."""
        found = []
        for tensor, rank in messages:
            link = self._links[rank]
            found.append((link, link.broadcast(tensor, check)))
        return found

    def wait(self, work: list[tuple[GlooLink, _GlooWork]], deadline: float, check: Check) -> None:
        """See `Link`. Whichever connection broke is told of first."""
        waiting, polls = list(work), 0
        while waiting:
            late = time.monotonic() > deadline
            done = [pair for pair in waiting if late or pair[0].poll(pair[1])]
            waiting = [pair for pair in waiting if pair not in done]
            for link, one in done:
                link.wait(one, deadline, check)
            if waiting:
                polls += 1
                if polls % _POLLS_BETWEEN_CHECKS == 0:
                    check()
                time.sleep(_POLL_S)

    def abort(self) -> None:
        """See `Link`."""
        for link in self._links.values():
            link.abort()


@dataclass(frozen=True)
class _Queued:
    """What was sent on the link's stream; holds the memory that it reads."""

    done: torch.cuda.Event
    tensors: Sequence[torch.Tensor]

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.done)


class NcclLink:
    """A trainer rank over a NCCL communicator with a stream of its own.

    The communicator is built at the first broadcast, as torch's own groups do it: their ranks
    look for its id then, and the tensor says which GPU is meant.
    """

    def __init__(self, keys: Store, world_size: int, timeout_s: float, rank: int = 0) -> None:
        self._keys = keys
        self._rank = rank
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
            return _Queued(stream.record_event(), [tensor])

    def send(self, messages: Sequence[Outgoing], check: Check) -> _Queued:
        """See `Link`. Without messages it builds the communicator, which takes all ranks, those
        too that have nothing to send; on the current device then."""
        self._check = check
        deadline = time.monotonic() + self._timeout_s
        tensors = [tensor for tensor, _ in messages]
        with torch.cuda.device(tensors[0].device) if tensors else nullcontext():
            comm, stream = self._connect(deadline)
            stream.wait_stream(torch.cuda.current_stream())
            comm.exchange(
                sends=[(tensor.data_ptr(), tensor.nbytes, rank) for tensor, rank in messages],
                stream=stream.cuda_stream,
                deadline=deadline,
            )
            return _Queued(stream.record_event(), tensors)

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
            self._comm = Communicator(
                self._unique_id(deadline),
                rank=self._rank,
                world_size=self._world_size,
                deadline=deadline,
                look=lambda: self._check(),
            )
            # Before the copies that pack the next bucket, which would take every processor.
            self._stream = torch.cuda.Stream(priority=-1)
        return self._comm, self._stream

    def _unique_id(self, deadline: float) -> bytes:
        """That of the communicator: rank 0 makes it."""
        if self._rank == 0:
            unique_id = new_unique_id()
            self._keys.set(NCCL_ID_KEY, unique_id)  # type: ignore[arg-type]
            return unique_id
        while not self._keys.check([NCCL_ID_KEY]):
            self._check()
            if time.monotonic() > deadline:
                raise TimeoutError("rank 0 has made no communicator in time")
            time.sleep(_ASK_S)
        return bytes(self._keys.get(NCCL_ID_KEY))


def connect(
    backend: str,
    keys: Store,
    world_size: int,
    timeout_s: float,
    *,
    rank: int = 0,
    senders: int = 0,
) -> Link:
    """A link over `backend` ("nccl" or "gloo") once every member came; keys: of the back end.
    rank, senders: as in `SenderGroup`."""
    if backend == "nccl":
        return NcclLink(keys, world_size, timeout_s, rank)
    if senders:
        return GlooPairLinks(keys, rank, senders, world_size, timeout_s)
    return GlooLink(keys, world_size, timeout_s)
