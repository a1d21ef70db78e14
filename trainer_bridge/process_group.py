"""A process group between one trainer rank and the ranks of engines, beside any other group.

The sender is rank 0, hosts the store and is known by (address, port); everybody else joins by
`JoinGroup`. The store keys are those that torch's own helper derives for a group of this name
behind `PrefixStore(name)`, as OpenRLHF, slime and SGLang form it, so that either side may be
theirs; the back end is built directly, so that no default group is needed or changed.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from engine.errors import GroupError, UpdateTimeout

Backend = Literal["nccl", "gloo"]
_POLL_S = 0.00005


def joined_key(rank: int) -> str:
    """The key that a member of ours sets when it comes, so that an absent one can be named."""
    return f"slipstream/joined/{rank}"


class SenderGroup:
    """Rank 0 of a group of `world_size`: listens once built, complete after `connect`.

    port: 0 takes a free one; the attribute `port` is the one taken. timeout_s: for a member to
    come. Raises GroupError when the port is in use.
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
    ) -> None:
        self.name = name
        self.address = address
        self.world_size = world_size
        self.backend = backend
        self.timeout_s = timeout_s
        self._group: Any = None
        store = _listen(name, address, port, timeout_s)
        self.port = int(store.port)
        self._keys = PrefixStore(name, store)

    @property
    def is_open(self) -> bool:
        """Whether every rank came and none was lost."""
        return self._group is not None

    def connect(self) -> None:
        """Wait until every rank came. Raises GroupError naming those that did not."""
        self._keys.set(joined_key(0), "1")
        self._await_members()
        timeout = timedelta(seconds=self.timeout_s)
        device = "cuda" if self.backend == "nccl" else "cpu"
        keys = PrefixStore(f"{device}/", PrefixStore(f"{self.name}/", self._keys))
        if self.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(keys, 0, self.world_size, options)
        else:
            self._group = dist.ProcessGroupGloo(keys, 0, self.world_size, timeout)

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """Queue the broadcast of a contiguous tensor to all; returns its work handle."""
        assert self._group is not None, "broadcast before connect"
        return self._group.broadcast([tensor], dist.BroadcastOptions())

    def wait(self, work: Any, deadline: float) -> None:
        """Wait for a broadcast on the host, until `deadline` (of time.monotonic) at most.

        Raises UpdateTimeout past it and GroupError when a member is gone, having torn the
        group down either way.
        """
        try:
            if self.backend == "gloo":
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                return
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(_POLL_S)
        except (TimeoutError, RuntimeError) as error:
            self.abort()
            if time.monotonic() >= deadline:
                raise UpdateTimeout(
                    f"a broadcast in group {self.name!r} was not received in time",
                    field=self.name,
                ) from error
            raise GroupError(
                f"a member of group {self.name!r} is gone: {error}", field=self.name
            ) from error

    def abort(self) -> None:
        """Drop the group at once, whatever is queued on it. Idempotent."""
        group, self._group = self._group, None
        if group is not None and self.backend == "nccl":
            group.abort()

    def close(self) -> None:
        """Leave the group, and stop listening. Idempotent."""
        group, self._group = self._group, None
        if group is not None and self.backend == "nccl":
            group.shutdown()

    def _await_members(self) -> None:
        """Look for the keys of our engines' ranks; the back ends would wait without a name."""
        deadline = time.monotonic() + self.timeout_s
        absent = list(range(1, self.world_size))
        while absent := [rank for rank in absent if not self._keys.check([joined_key(rank)])]:
            if time.monotonic() > deadline:
                raise GroupError(
                    f"rank {', '.join(map(str, absent))} of {self.world_size} did not join group "
                    f"{self.name!r} at {self.address}:{self.port} within {self.timeout_s:g} s",
                    field=f"rank {absent[0]}",
                )
            time.sleep(_POLL_S)


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
