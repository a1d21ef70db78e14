"""Joining a trainer of vLLM's native RL dialect: a raw NCCL communicator behind a TCPStore.

As vLLM's `StatelessProcessGroup` and `PyNcclCommunicator` do it: rank 0 puts a pickled
ncclUniqueId under `broadcast_from/0/0`, everybody builds the communicator, and an all-reduce
of one float32 completes the handshake.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.comm.nccl import UNIQUE_ID_BYTES
from engine.errors import GroupError
from engine.protocol import JoinGroup
from engine.weights import trainer_store
from engine.weights.helpers import Helpers, nothing
from engine.weights.lane import Look
from engine.weights.nccl_group import NcclGroup
from engine.weights.unpickle import NcclUniqueId, restricted_loads
from kernels.torch_compat import Store

_ID_KEY = "broadcast_from/0/0"


def join(
    command: JoinGroup,
    rank: int,
    device: torch.device,
    deadline: float,
    look: Look = nothing,
    helpers: Helpers | None = None,
    park: Callable[[NcclGroup], object] = NcclGroup.abort,
) -> NcclGroup:
    """Become `rank` of the trainer's communicator, complete when this returns.

    Raises GroupError when the trainer, or another rank, does not come by `deadline`; `park` gets
    the group then, which NCCL may not have let go of.
    """
    if command.backend != "nccl":
        raise GroupError("the 'vllm' rendezvous has NCCL only", field="backend")
    if command.unique_id:
        unique_id, store = command.unique_id, None
    else:
        store = trainer_store.connect(command, deadline, look, use_libuv=False)
        unique_id = _id_bytes(_published(store, command, deadline, look))
    group = NcclGroup(command, rank, device, lambda _deadline: unique_id, store, look, helpers)
    formed = False
    try:
        group.warm_up(deadline)
        formed = True
    finally:
        if not formed:
            park(group)
    return group


def _published(store: Store, command: JoinGroup, deadline: float, look: Look) -> object:
    try:
        return restricted_loads(trainer_store.await_key(store, _ID_KEY, command, deadline, look))
    except TimeoutError as error:
        raise GroupError(
            f"rank 0 (trainer) of group {command.name!r} did not publish a NCCL id in time",
            field="rank 0",
        ) from error


def _id_bytes(unpickled: object) -> bytes:
    raw = unpickled.internal if isinstance(unpickled, NcclUniqueId) else unpickled
    try:
        unique_id = bytes(raw)  # type: ignore[call-overload]
    except TypeError:
        unique_id = b""
    if len(unique_id) != UNIQUE_ID_BYTES:
        raise GroupError(f"the store holds no NCCL id under {_ID_KEY!r}", field="rank 0")
    return unique_id
