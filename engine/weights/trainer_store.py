"""Finding the other ranks of a trainer's group, each wait with a deadline and a name.

The trainer's rank 0 hosts a TCPStore. Trainers that wait in its constructor until `world_size`
clients came are satisfied by the `world_size` a client passes. Keys lie behind
`PrefixStore(name)`, where each rank of ours leaves one when it comes, so that an absent rank
can be named; back ends themselves wait without a name.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterable
from datetime import timedelta

from engine.comm.rendezvous import joined_key
from engine.errors import GroupError
from engine.protocol import JoinGroup
from engine.protocol.deadlines import capped
from engine.weights.group import seconds_left
from engine.weights.helpers import Helpers, nothing
from engine.weights.lane import Look
from kernels.torch_compat import Store, TCPStore

_POLL_S = 0.001
_SLICE_S = 0.1
_RETRY_S = 0.05
_DIAL_S = 2.0
_ANSWER_S = 5.0
_ANSWER_BYTES = 8
_MOST_KEYS = 1 << 40
_HELLO = b"\x00" + struct.pack("=I", 0x3C85F7CE) + b"\x07"
"""c10d's TCPStore: VALIDATE with its magic number, then GETNUMKEYS, answered by an int64."""


def connect(
    command: JoinGroup, deadline: float, look: Look = nothing, *, use_libuv: bool = True
) -> TCPStore:
    """A client of the trainer's store. Raises GroupError when nobody listens there, or somebody
    who is no store, and what `look` raises.

    torch's client waits for ever for a peer that accepts and says nothing: whoever is there is
    asked over a plain socket first.
    """
    _ask(command, deadline, look)
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
        raise nobody_answers(command, error) from error


def nobody_answers(command: JoinGroup, why: object) -> GroupError:
    """The error of an address where no store is."""
    return GroupError(
        f"group {command.name!r}: nobody answers at {command.address}:{command.port} within "
        f"{capped(command.timeout_s):g} s; the trainer's rank 0 must listen there ({why})",
        field="address",
    )


def _ask(command: JoinGroup, deadline: float, look: Look) -> None:
    """Say to a store what torch's client says first, and ask how many keys it has: any store
    answers eight bytes. Raises GroupError as `connect` does."""
    with _dial(command, deadline, look) as peer:
        peer.settimeout(_SLICE_S)
        answer = b""
        try:
            peer.sendall(_HELLO)
            while len(answer) < _ANSWER_BYTES:
                look()
                if time.monotonic() > deadline:
                    raise nobody_answers(command, "it accepts and says nothing")
                try:
                    got = peer.recv(_ANSWER_BYTES - len(answer))
                except TimeoutError:
                    continue
                if not got:
                    raise _no_store(command, "it closes the connection")
                answer += got
        except OSError as error:
            raise _no_store(command, error) from error
    if not 0 <= int.from_bytes(answer, sys.byteorder, signed=True) < _MOST_KEYS:
        raise _no_store(command, f"it says {answer!r}")


def _dial(command: JoinGroup, deadline: float, look: Look) -> socket.socket:
    """A connection to the address, which may not be listening yet."""
    while True:
        look()
        try:
            timeout_s = min(_DIAL_S, seconds_left(deadline))
            return socket.create_connection((command.address, command.port), timeout=timeout_s)
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror | UnicodeError):
                raise nobody_answers(command, error) from error
        time.sleep(min(_RETRY_S, seconds_left(deadline)))


def _no_store(command: JoinGroup, why: object) -> GroupError:
    return GroupError(
        f"group {command.name!r}: what answers at {command.address}:{command.port} is no store of "
        f"torch.distributed ({why}); the trainer's rank 0 must listen there",
        field="address",
    )


def announce_and_await(
    keys: Store, command: JoinGroup, rank: int, deadline: float, look: Look = nothing
) -> None:
    """Say that `rank` came and wait for every other engine rank.

    Rank 0 is the trainer, which need not say that it came: it hosts the store.
    Raises GroupError naming the ranks that did not come.
    """
    try:
        keys.set(joined_key(rank), "1")
        absent = list(range(1, command.world_size))
        while absent := [other for other in absent if not keys.check([joined_key(other)])]:
            look()
            if time.monotonic() > deadline:
                raise absent_error(command, absent)
            time.sleep(_POLL_S)
    except RuntimeError as error:
        raise store_lost(command, error) from error


def await_key(
    keys: Store, key: str, command: JoinGroup, deadline: float, look: Look = nothing
) -> bytes:
    """The value of a key that rank 0 will set. Raises TimeoutError, and GroupError when rank 0
    is gone."""
    try:
        while not keys.check([key]):
            look()
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
        f"{command.address}:{command.port} within {capped(command.timeout_s):g} s; check "
        "world_size and that each engine was told to join",
        field=f"rank {ranks[0]}",
    )


def store_lost(command: JoinGroup, error: Exception) -> GroupError:
    """The error of a store that went away."""
    return GroupError(
        f"rank 0 (trainer) of group {command.name!r} at {command.address}:{command.port} is "
        f"gone ({error})",
        field="rank 0",
    )


def answers(store: Store, helpers: Helpers) -> bool:
    """Whether the trainer that hosts this store is still the one that was connected to."""
    try:
        helpers.call(lambda: store.check(["slipstream/alive"]), time.monotonic() + _ANSWER_S)
    except (RuntimeError, TimeoutError):
        return False
    return True


def is_listening(command: JoinGroup) -> bool:
    """Whether a process still holds the port of the store: not so when the trainer died."""
    try:
        with socket.create_connection((command.address, command.port), timeout=1.0):
            return True
    except OSError:
        return False
