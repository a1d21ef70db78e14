"""A process group between trainer ranks and the ranks of engines, beside any other group.

Trainer rank 0 is rank 0, hosts the store and is known by (address, port). It may be the only one;
where there are others they come next, and meet it there. Engines join by `JoinGroup`. The store's
keys are `engine.comm.rendezvous`'s, so either side may be another project's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from engine.comm.rendezvous import backend_prefix, joined_key
from engine.errors import GroupError, UpdateTimeout
from kernels.torch_compat import PrefixStore, TCPStore
from trainer_bridge.links import Check, Link, Outgoing, connect
from trainer_bridge.peers import Peers

logger = logging.getLogger(__name__)

Backend = Literal["nccl", "gloo"]
_POLL_S = 0.00005
_ASK_S = 0.002
_STOPPED_KEY = "slipstream/stopped"
_STOP_S = 5.0


class SenderGroup:
    """A trainer rank of a group of `world_size`: rank 0 listens once built; complete after
    `connect`.

    port: of rank 0; there, 0 takes a free one, and the attribute `port` is the one taken.
    timeout_s: for a member to come. senders: trainer ranks, of a group in which each of them sends
    to every engine rank by itself; 0 of one in which rank 0 broadcasts. rank: of them. own_address:
    under which rank 0 reaches this one. Raises GroupError when the port is in use, or nobody
    listens there.
    """

    def __init__(
        self,
        name: str,
        *,
        world_size: int,
        backend: Backend,
        address: str = "127.0.0.1",
        port: int = 0,
        timeout_s: float = 300.0,
        rank: int = 0,
        senders: int = 0,
        own_address: str = "127.0.0.1",
    ) -> None:
        self.name = name
        self.address = address
        self.world_size = world_size
        self.backend = backend
        self.timeout_s = timeout_s
        self.rank = rank
        self.senders = senders
        self._link: Link | None = None
        self._peers = Peers(own_address if rank else "")
        store = (
            _meet(name, address, port, timeout_s)
            if rank
            else _listen(name, address, port, timeout_s)
        )
        self.port = port if rank else int(store.port)
        self._held: PrefixStore | None = PrefixStore(name, store)

    @property
    def is_open(self) -> bool:
        """Whether every rank came and none was lost."""
        return self._link is not None

    def connect(self, check: Check = lambda: None) -> None:
        """Wait until every rank came. Raises GroupError naming those that did not, and what
        `check` raises, which is called now and then."""
        try:
            self._keys.set(joined_key(self.rank), self._peers.own or "1")
            self._await_members(check)
            self._watch_peers()
        except RuntimeError as error:
            raise self._broken(error) from error
        # Not before: an error of what waits there would keep the store open by it.
        device = "cuda" if self.backend == "nccl" else "cpu"
        keys = PrefixStore(backend_prefix(self.name, device), self._keys)
        try:
            self._link = connect(
                self.backend,
                keys,
                self.world_size,
                self.timeout_s,
                rank=self.rank,
                senders=self.senders,
            )
        except RuntimeError as error:
            raise self._broken(error) from error

    def num_arrived(self) -> int:
        """How many other ranks have found the group."""
        return sum(self._keys.check([joined_key(rank)]) for rank in range(1, self.world_size))

    def send(self, messages: Sequence[Outgoing], check: Check = lambda: None) -> Any:
        """Queue messages, contiguous tensors and the ranks that they are for, which travel all at
        once; returns their work. Of groups with `senders`. Raises as `wait` does."""
        link = self._open_link()
        try:
            return link.send(messages, check)
        except (TimeoutError, RuntimeError) as error:
            raise self._broken(error) from error

    def broadcast(self, tensor: torch.Tensor, check: Check = lambda: None) -> Any:
        """Queue the broadcast of a contiguous tensor to all; returns its work: see `Link`.

        Raises as `wait` does.
        """
        link = self._open_link()
        try:
            return link.broadcast(tensor, check)
        except (TimeoutError, RuntimeError) as error:
            raise self._broken(error) from error

    def wait(self, work: Any, deadline: float, check: Check = lambda: None) -> None:
        """Wait for a broadcast on the host, until `deadline` (of time.monotonic) at most.

        Raises UpdateTimeout past it and GroupError when a member is gone, having torn the
        group down either way, or the group was dropped; and what `check` raises, which is called
        now and then.
        """
        link = self._open_link()
        try:
            link.wait(work, deadline, check)
        except (TimeoutError, RuntimeError) as error:
            raise self._broken(error, late=time.monotonic() >= deadline) from error

    def check_stopped(self) -> None:
        """Raise GroupError, having torn the group down, once it was told to stop, or another
        trainer rank is gone."""
        try:
            if self._held is None or not self._held.check([_STOPPED_KEY]):
                self._check_peers()
                return
            reason = self._keys.get(_STOPPED_KEY).decode()
        except RuntimeError as error:
            raise self._broken(error) from error
        self.abort()
        raise GroupError(f"group {self.name!r} was given up: {reason}", field=self.name)

    def _watch_peers(self) -> None:
        for other in range(1, self.senders) if self.rank == 0 else ():
            self._peers.watch(other, self._keys.get(joined_key(other)).decode())

    def _check_peers(self) -> None:
        try:
            self._peers.check()
        except GroupError:
            self.abort()
            raise

    def stop(self, reason: str) -> None:
        """Have the other trainer ranks of the group give up their waits."""
        try:
            if self._held is not None:
                self._held.set(_STOPPED_KEY, reason)
        except RuntimeError as error:
            logger.warning("group %s cannot be told to stop: %s", self.name, error)

    def abort(self) -> None:
        """Drop the group at once, whatever is queued on it; other trainer ranks notice.
        Idempotent."""
        link, self._link = self._link, None
        if link is not None:
            link.abort()
        self._peers.close()

    def close(self) -> None:
        """Leave the group and listen no more: ranks that still wait to join notice. Idempotent."""
        self.abort()
        self._held = None

    @property
    def _keys(self) -> PrefixStore:
        assert self._held is not None, "a group was used after its close"
        return self._held

    def _open_link(self) -> Link:
        if self._link is None:
            raise GroupError(
                f"group {self.name!r} is not connected, or was dropped; form it again",
                field=self.name,
            )
        return self._link

    def _broken(self, error: Exception, *, late: bool = False) -> GroupError | UpdateTimeout:
        self.abort()
        if late or isinstance(error, TimeoutError):
            return UpdateTimeout(
                f"a broadcast in group {self.name!r} was not received in time", field=self.name
            )
        return GroupError(f"a member of group {self.name!r} is gone: {error}", field=self.name)

    def _await_members(self, check: Check) -> None:
        """Look for the keys of the other ranks; the back ends would wait without a name."""
        deadline = time.monotonic() + self.timeout_s
        absent = [rank for rank in range(self.world_size) if rank != self.rank]
        while absent := [rank for rank in absent if not self._keys.check([joined_key(rank)])]:
            check()
            self.check_stopped()
            if time.monotonic() > deadline:
                raise GroupError(
                    f"rank {', '.join(map(str, absent))} of {self.world_size} did not join group "
                    f"{self.name!r} at {self.address}:{self.port} within {self.timeout_s:g} s",
                    field=f"rank {absent[0]}",
                )
            # Another process's store is asked over a connection.
            time.sleep(_ASK_S if self.rank else _POLL_S)


def stop(name: str, address: str, port: int, reason: str) -> None:
    """Have the sender of the group at (address, port) give up its waits, from another process.

    No error when it is gone already.
    """
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_STOP_S))
        PrefixStore(name, store).set(_STOPPED_KEY, reason)
    except (RuntimeError, dist.DistError) as error:
        logger.warning("group %s at %s:%d cannot be told to stop: %s", name, address, port, error)


def _listen(name: str, address: str, port: int, timeout_s: float) -> TCPStore:
    try:
        return TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, dist.DistError) as error:
        raise GroupError(
            f"cannot listen at {address}:{port} for group {name!r}; choose another port, or 0 "
            f"for a free one ({error})",
            field="port",
        ) from error


def _meet(name: str, address: str, port: int, timeout_s: float) -> TCPStore:
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, dist.DistError) as error:
        raise GroupError(
            f"trainer rank 0 of group {name!r} does not answer at {address}:{port} ({error})",
            field="rank 0",
        ) from error
