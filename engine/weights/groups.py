"""The process groups this rank shares with trainers, by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from engine.errors import GroupError
from engine.parallel.mesh import Mesh
from engine.protocol import JoinGroup
from engine.weights import rendezvous, vllm_group
from engine.weights.gloo_group import GlooGroup
from engine.weights.group import Group
from engine.weights.nccl_group import NcclGroup

logger = logging.getLogger(__name__)


class Groups:
    """Owner of this rank's groups. Several may be open at once."""

    def __init__(self, device: torch.device, mesh: Mesh) -> None:
        self._device = device
        self._mesh = mesh
        self._open: dict[str, tuple[JoinGroup, Group]] = {}
        self._stranded: list[torch.Tensor] = []

    @property
    def tp_rank(self) -> int:
        """This rank among those of its engine."""
        return self._mesh.tp_rank

    @property
    def names(self) -> list[str]:
        """Names of the groups that are open."""
        return sorted(self._open)

    def join(self, command: JoinGroup) -> None:
        """Become rank `rank_offset` + tp_rank of the trainer's group.

        Joining again by the same arguments is no error. By others, or when the trainer of the
        old group is gone, a trainer has started again, and its group replaces the old one.
        Raises GroupError naming what is missing.
        """
        known = self._open.get(command.name)
        if known is not None and known[0] == command and known[1].is_alive():
            return
        self._check(command)
        if known is not None:
            logger.warning("group %s is joined anew; the old one is dropped", command.name)
            self.leave(command.name)
        started = time.monotonic()
        self._open[command.name] = (command, self._connect(command))
        logger.info(
            "joined group %s of %d ranks at %s:%d in %.2f s",
            command.name,
            command.world_size,
            command.address,
            command.port,
            time.monotonic() - started,
        )

    def leave(self, name: str, buffers: Sequence[torch.Tensor] = ()) -> None:
        """Drop a group; no error when there is none. What is queued on it is lost.

        buffers: what it was receiving into. If the group cannot be ended they are kept for the
        life of the process: memory that a broadcast may still write to must go to nobody else.
        """
        known = self._open.pop(name, None)
        if known is None or known[1].abort():
            return
        self._stranded += buffers
        logger.error(
            "group %s hangs while it is ended; %d bytes that it may still write to are kept",
            name,
            sum(buffer.nbytes for buffer in buffers),
        )

    def get(self, name: str) -> Group:
        """The group `name`. Raises GroupError when it was not joined or broke."""
        known = self._open.get(name)
        if known is None:
            others = ", ".join(self.names) or "none"
            raise GroupError(
                f"no group {name!r}: join it first, and again after it broke (open: {others})",
                field="group",
            )
        return known[1]

    def world_size(self, name: str) -> int:
        """Ranks of the group `name`, the trainer's included."""
        self.get(name)
        return self._open[name][0].world_size

    def close(self) -> None:
        """Leave every group. Idempotent."""
        for name in self.names:
            self.leave(name)

    def _check(self, command: JoinGroup) -> None:
        last = command.rank_offset + self._mesh.tp_size - 1
        if command.rank_offset < 1 or last >= command.world_size:
            raise GroupError(
                f"group {command.name!r} has world_size {command.world_size}, and rank_offset "
                f"{command.rank_offset} puts this engine's {self._mesh.tp_size} rank(s) at "
                f"{command.rank_offset} to {last}; the trainer is rank 0",
                field="world_size",
            )
        if command.backend == "nccl" and self._device.type != "cuda":
            raise GroupError(
                f"group {command.name!r}: backend 'nccl' needs a GPU and this engine runs on the "
                "CPU; use 'gloo'",
                field="backend",
            )

    def _connect(self, command: JoinGroup) -> Group:
        rank = command.rank_offset + self._mesh.tp_rank
        deadline = time.monotonic() + command.timeout_s
        if command.rendezvous == "vllm":
            return vllm_group.join(command, rank, self._device, deadline)
        store = rendezvous.connect(command, deadline)
        if command.backend == "gloo":
            return GlooGroup(store, command, rank, deadline)
        return NcclGroup.behind_store(store, command, rank, self._device, deadline)
