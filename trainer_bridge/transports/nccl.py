"""Weights by broadcast: NCCL between GPUs, gloo between CPUs.

One sender: trainer rank 0 sends everything. Several: every trainer rank has a group with all
engine ranks and sends its own pieces, so that nothing funnels through rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from engine.errors import SlipstreamError, UpdateTimeout
from engine.protocol import (
    BeginUpdate,
    JoinGroup,
    LeaveGroup,
    ReceiveBroadcast,
    TensorPiece,
    plan_buckets,
)
from trainer_bridge.adapters.base import WeightSource, in_order, whole_piece
from trainer_bridge.fleet import Member
from trainer_bridge.packing import BucketPacker
from trainer_bridge.process_group import Backend, SenderGroup
from trainer_bridge.transports.base import Carrier
from trainer_bridge.update_target import UpdateTarget, try_send

BUCKET_BYTES = 256 << 20

_ARRIVAL_S = 5.0
_ARRIVAL_POLL_S = 0.005


class Broadcaster:
    """The sending end of one group: packs pieces into buckets and broadcasts them."""

    def __init__(
        self, group: SenderGroup, device: torch.device, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.group = group
        self._packer = BucketPacker(device, bucket_bytes)

    @property
    def bucket_bytes(self) -> int:
        """Most bytes of a bucket, unless one piece is larger."""
        return self._packer.bucket_bytes

    def send(
        self,
        pieces: list[TensorPiece],
        flats: Iterator[torch.Tensor],
        *,
        deadline: float,
        check: Callable[[], None] = lambda: None,
        lasting: bool = False,
    ) -> None:
        """Broadcast `flats`, the flat elements of `pieces` in order, until `deadline`.

        check: called now and then; raises when the receivers have given up. lasting: as in
        `BucketPacker.send`. Whatever is raised, also by `flats`, has torn the group down: the
        receivers notice at once.
        """
        places: dict[int, int] = {}

        def broadcast(packed: torch.Tensor) -> Any:
            check()
            work = self.group.broadcast(packed, check)
            places[id(work)] = len(places)
            return work

        def wait(work: Any) -> None:
            try:
                self._wait(work, deadline, check)
            except UpdateTimeout as error:
                first = self._first_of(pieces, places[id(work)])
                raise UpdateTimeout(f"{error.message}, from {first} on", field=first) from error

        sent = False
        try:
            self._packer.send(pieces, flats, broadcast, wait, resident=lasting)
            sent = True
        finally:
            if not sent:
                self.group.abort()

    def _first_of(self, pieces: list[TensorPiece], place: int) -> str:
        """The first tensor in bucket number `place`."""
        buckets = plan_buckets(pieces, self.bucket_bytes)
        return buckets[min(place, len(buckets) - 1)].placements[0].piece.name

    def _wait(self, work: Any, deadline: float, check: Callable[[], None]) -> None:
        try:
            self.group.wait(work, deadline, check)
        except SlipstreamError:
            # A receiver that refused says more than the broadcast that it left.
            check()
            raise


class NcclCarrier(Carrier):
    """All tensors from this process to every rank of every engine, in one group.

    The group is formed at the first update, and again where it broke, where an engine was
    started again and is no member any more, or where an update goes to a part of the engines.
    device: where the trainer's tensors are. port: 0 takes a free one. timeout_s: for the
    members to come, and for one update to be received.
    """

    def __init__(
        self,
        targets: Sequence[UpdateTarget],
        *,
        device: torch.device,
        address: str = "127.0.0.1",
        port: int = 0,
        name: str = "slipstream",
        bucket_bytes: int = BUCKET_BYTES,
        timeout_s: float = 300.0,
    ) -> None:
        self.targets = targets
        self._device = device
        self._address = address
        self._port = port
        self._name = name
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._sender: Broadcaster | None = None
        self._joined: list[str] = []

    def carry(self, begin: BeginUpdate, source: WeightSource, members: Sequence[Member]) -> None:
        """See `Carrier`."""
        sender = self._connected(members)
        pieces = [whole_piece(spec) for spec in begin.manifest]
        command = ReceiveBroadcast(
            group=self._name,
            tensors=pieces,
            bucket_bytes=sender.bucket_bytes,
            timeout_s=self._timeout_s,
            owner=begin.owner,
        )
        flats = (tensor.reshape(-1) for tensor in in_order(begin.manifest, source.tensors()))
        deadline = time.monotonic() + self._timeout_s
        with ThreadPoolExecutor(len(members)) as pool:
            received = [pool.submit(member.send, command) for member in members]
            sender.send(
                pieces,
                flats,
                deadline=deadline,
                check=lambda: check(received),
                lasting=source.lasting,
            )
        check(received, wait=True)

    def close(self) -> None:
        """See `Carrier`."""
        if self._sender is not None:
            for target in self.targets:
                try_send(target, LeaveGroup(name=self._name))
            self._drop()

    def _connected(self, members: Sequence[Member]) -> Broadcaster:
        names = [member.name for member in members]
        are_members = all(self._name in member.state.groups for member in members)
        is_whole = names == self._joined and are_members
        if self._sender is not None and self._sender.group.is_open and is_whole:
            return self._sender
        # Its port has to be free before the next one listens.
        self._drop()
        backend: Backend = "nccl" if self._device.type == "cuda" else "gloo"
        sizes = [member.state.num_ranks for member in members]
        group = SenderGroup(
            self._name,
            world_size=1 + sum(sizes),
            backend=backend,
            address=self._address,
            port=self._port,
            timeout_s=self._timeout_s,
        )
        connect(group, members, sizes)
        self._sender = Broadcaster(group, self._device, bucket_bytes=self._bucket_bytes)
        self._joined = names
        return self._sender

    def _drop(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.group.close()


def connect(group: SenderGroup, members: Sequence[Member], sizes: Sequence[int]) -> None:
    """Have every rank of every member join `group`. sizes: ranks of each.

    Raises GroupError naming the ranks that did not come, or the error of one that refused.
    """
    joins = join_commands(group, sizes)
    with ThreadPoolExecutor(len(members)) as pool:
        joined = []
        for member, join in zip(members, joins, strict=True):
            try_send(member.target, LeaveGroup(name=group.name))
            joined.append(pool.submit(member.send, join))
        complete(group, joined, sizes)
    check(joined, wait=True)


def complete(group: SenderGroup, joined: Sequence[Future[Any]], sizes: Sequence[int]) -> None:
    """Wait until every rank came; a group that fails is closed, so that those that came do not
    wait for those that did not.

    joined: the calls that have engines join; sizes: ranks of each. Raises the error of an
    engine that refused, at once, or GroupError naming absent ranks.
    """
    try:
        group.connect(lambda: check(joined))
    except SlipstreamError:
        check(joined)
        raise
    finally:
        if not group.is_open:
            _await_arrival(group, joined, sizes)
            group.close()


def _await_arrival(group: SenderGroup, joined: Sequence[Future[Any]], sizes: Sequence[int]) -> None:
    """Let the engines on their way find the group, for a moment: one that comes to a closed door
    knocks until its deadline, one that is inside sees it close."""
    deadline = time.monotonic() + _ARRIVAL_S
    while time.monotonic() < deadline:
        answered = sum(size for future, size in zip(joined, sizes, strict=True) if future.done())
        if all(future.done() for future in joined):
            return
        if group.num_arrived() + answered >= group.world_size - 1:
            return
        time.sleep(_ARRIVAL_POLL_S)


def join_commands(group: SenderGroup, sizes: Sequence[int]) -> list[JoinGroup]:
    """What each target is to do: its ranks follow those of the trainer and of the targets before
    it."""
    commands = []
    offset = max(1, group.senders)
    for size in sizes:
        commands.append(
            JoinGroup(
                name=group.name,
                address=group.address,
                port=group.port,
                rank_offset=offset,
                world_size=group.world_size,
                backend=group.backend,
                senders=group.senders,
                timeout_s=group.timeout_s,
            )
        )
        offset += size
    return commands


def check(futures: Sequence[Future[Any]], *, wait: bool = False) -> None:
    """Raise the error of the first call that failed; `wait` for those that run."""
    for future in futures:
        if wait or future.done():
            future.result()
