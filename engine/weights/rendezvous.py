"""Finding the other ranks of a trainer's group, each wait with a deadline and a name.

The trainer's rank 0 hosts a TCPStore. Trainers that wait in its constructor until `world_size`
clients came are satisfied by the `world_size` a client passes. Keys lie behind
`PrefixStore(name)`, where each rank of ours leaves one when it comes, so that an absent rank
can be named; back ends themselves wait without a name.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from engine.errors import GroupError
from engine.protocol import JoinGroup
from engine.protocol.rendezvous import joined_key
from engine.weights.group import seconds_left

_POLL_S = 0.001


def connect(command: JoinGroup, deadline: float, *, use_libuv: bool = True) -> TCPStore:
    """A client of the trainer's store. Raises GroupError when nobody listens there."""
    try:
        return TCPStore(
            command.address,
            command.port,
            world_size=command.world_size,
            is_master=False,
            timeout=timedelta(seconds=seconds_left(deadline)),
            use_libuv=use_libuv,
        )
    except (RuntimeError, ValueError) as error:
        raise GroupError(
            f"group {command.name!r}: nobody answers at {command.address}:{command.port} within "
            f"{command.timeout_s:g} s; the trainer's rank 0 must listen there ({error})",
            field="address",
        ) from error


def announce_and_await(keys: Store, command: JoinGroup, rank: int, deadline: float) -> None:
    """Say that `rank` came and wait for every other engine rank.

    Rank 0 is the trainer, which need not say that it came: it hosts the store.
    Raises GroupError naming the ranks that did not come.
    """
    try:
        keys.set(joined_key(rank), "1")
        absent = list(range(1, command.world_size))
        while absent := [other for other in absent if not keys.check([joined_key(other)])]:
            if time.monotonic() > deadline:
                raise absent_error(command, absent)
            time.sleep(_POLL_S)
    except RuntimeError as error:
        raise store_lost(command, error) from error


def await_key(keys: Store, key: str, command: JoinGroup, deadline: float) -> bytes:
    """The value of a key that rank 0 will set. Raises TimeoutError, and GroupError when rank 0
    is gone."""
    try:
        while not keys.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_POLL_S)
        return bytes(keys.get(key))
    except RuntimeError as error:
        raise store_lost(command, error) from error


def absent_error(command: JoinGroup, absent: Iterable[int]) -> GroupError:
    """The error of a group some ranks of which did not come."""
    ranks = list(absent)
    names = ", ".join(f"rank {rank}{' (trainer)' if rank == 0 else ''}" for rank in ranks)
    return GroupError(
        f"{names} of {command.world_size} did not join group {command.name!r} at "
        f"{command.address}:{command.port} within {command.timeout_s:g} s; check world_size and "
        "that each engine was told to join",
        field=f"rank {ranks[0]}",
    )


def store_lost(command: JoinGroup, error: Exception) -> GroupError:
    """The error of a store that went away."""
    return GroupError(
        f"rank 0 (trainer) of group {command.name!r} at {command.address}:{command.port} is "
        f"gone ({error})",
        field="rank 0",
    )


def answers(store: Store) -> bool:
    """Whether the trainer that hosts this store is still the one that was connected to."""
    try:
        store.check(["slipstream/alive"])
    except RuntimeError:
        return False
    return True


def is_listening(command: JoinGroup) -> bool:
    """Whether a process still holds the port of the store: not so when the trainer died."""
    try:
        with socket.create_connection((command.address, command.port), timeout=1.0):
            return True
    except OSError:
        return False
