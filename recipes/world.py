"""The processes of a run, as `torchrun` starts them, and the little they tell each other.

Every process takes the same decisions from the same data: rollouts are gathered to all of them,
so that only rollouts and gradients are divided. One process alone is a world of one.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from engine.config import Device
from engine.errors import InvalidRequest
from engine.protocol.deadlines import RES_OPTIONS
from kernels.torch_compat import HashStore
from rollout.replica.leave import leave_at_once, run_what_is_registered

T = TypeVar("T")

TIMEOUT_S = 1800.0
"""Deadline of a collective: ranks wait for the one whose replies are longest."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the run.

    local_rank: among those of this host; the GPU it has. rollout_ranks: the first so many have
    an engine, or speak with engines elsewhere; the others only train.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    rollout_ranks: int = 1
    owns_group: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def share(self, num: int) -> range:
        """Which of `num` items this process rolls out: runs as even as they can be."""
        if self.rank >= self.rollout_ranks:
            return range(num, num)
        cuts = [num * rank // self.rollout_ranks for rank in range(self.rollout_ranks + 1)]
        return range(cuts[self.rank], cuts[self.rank + 1])

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, in the order of their ranks; collective."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def from_main(self, value: T) -> T:
        """The value that the main process gave; collective."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes; collective."""
        self.gather([None])

    def close(self) -> None:
        """Leave the process group, if `open_world` made one."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process; nothing of the run may be left to do.

    One that torchrun started leaves without tearing the interpreter down: a thread of gloo that
    drops its last tensor then would be ended by Python inside C++, which is SIGABRT
    (https://github.com/pytorch/pytorch/pull/179291), and torchrun would end all the others.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    run_what_is_registered()
    leave_at_once(code)


def launched_rank() -> int:
    """The rank that torchrun gave this process; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def open_world(*, device: Device, needs_group: bool, colocated: bool) -> World:
    """Join the processes that torchrun started, or be alone.

    device: of the trainer. needs_group: a process that is alone makes a group of its own, for
    trainers that cannot do without one. colocated: every rank has an engine; else only the
    first speaks with engines. Raises InvalidRequest when a rank has no GPU of its own.
    """
    size, local_rank = (
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )
    on_gpu = uses_gpu(device)
    if on_gpu:
        _require_gpu(local_rank)
        torch.cuda.set_device(local_rank)
    owns = (size > 1 or needs_group) and not dist.is_initialized()
    if owns:
        _join("cpu:gloo,cuda:nccl" if on_gpu else "gloo", alone=size == 1)
    return World(
        rank=launched_rank(),
        size=size,
        local_rank=local_rank,
        rollout_ranks=size if colocated else 1,
        owns_group=owns,
    )


def uses_gpu(device: Device) -> bool:
    """Whether 'auto', 'cpu' or 'cuda' is a GPU here."""
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _join(backend: str, *, alone: bool) -> None:
    # Read by threads that ask the resolver for the first time, as those of the stores do.
    os.environ.setdefault("RES_OPTIONS", RES_OPTIONS)
    timeout = timedelta(seconds=TIMEOUT_S)
    if alone:
        store = HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def _require_gpu(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise InvalidRequest(
            f"rank {local_rank} of this host has no GPU: there are {torch.cuda.device_count()}; "
            "lower --nproc-per-node",
            field="nproc-per-node",
        )
