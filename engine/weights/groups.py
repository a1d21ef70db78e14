"""The process groups this rank shares with trainers, by name."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import torch

from engine.errors import GroupError
from engine.parallel.mesh import Mesh
from engine.protocol import JoinGroup
from engine.protocol.deadlines import capped
from engine.weights import trainer_store, vllm_group
from engine.weights.gloo_group import GlooGroup
from engine.weights.gloo_pairs import GlooPairs
from engine.weights.group import Group
from engine.weights.helpers import Helpers, nothing
from engine.weights.lane import Look
from engine.weights.nccl_group import NcclGroup

logger = logging.getLogger(__name__)

_GRACE_S = 1.0
"""By which a helper comes back with a better reason, if it can."""
_OUTLAST_S = 0.1
"""Between looks at a dropped group that has not ended."""
_MOST_RANKS = 65536
_MOST_PARKED = 16


class _Parked:
    """A group that was dropped while its back end still uses it, and its memory.

    A thread of its own holds both until the back end has let go. Whoever held them last would
    run the group's destructor, which waits for what is queued, up to that one's own deadline,
    and lets no other thread of the process run meanwhile: not even once nobody knows this object
    any more. A process that ends sooner is left at once (`rollout.replica.leave`).
    """

    def __init__(self, group: Group, memory: Sequence[torch.Tensor]) -> None:
        self.memory = memory
        self._group = group
        self._lock = threading.Lock()
        threading.Thread(target=self._outlast, name="weights-parked", daemon=True).start()

    def ended(self) -> bool:
        """Whether the back end has let go; False while it is being asked to."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._group.abort()
        finally:
            self._lock.release()

    def _outlast(self) -> None:
        with self._lock:
            ended = self._group.abort()
        if not ended:
            num_bytes = sum(tensor.nbytes for tensor in self.memory)
            name = self._group.name
            logger.warning("group %s does not end; it is kept, with %d bytes", name, num_bytes)
        while not self.ended():
            time.sleep(_OUTLAST_S)


class Groups:
    """Owner of this rank's groups. Several may be open at once, and forming at once: joining and
    leaving are called from threads of their own."""

    def __init__(self, device: torch.device, mesh: Mesh) -> None:
        self._device = device
        self._mesh = mesh
        self._helpers = Helpers()
        self._lock = threading.Lock()
        self._open: dict[str, tuple[JoinGroup, Group]] = {}
        self._memory: dict[str, Sequence[torch.Tensor]] = {}
        self._parked: list[_Parked] = []

    @property
    def rank(self) -> int:
        """This rank among those of its engine."""
        return self._mesh.rank

    @property
    def names(self) -> list[str]:
        """Names of the groups that are open."""
        with self._lock:
            return sorted(self._open)

    @property
    def num_parked(self) -> int:
        """Groups that were dropped and whose back end has not let go of them yet."""
        with self._lock:
            self._parked = [parked for parked in self._parked if not parked.ended()]
            return len(self._parked)

    def join(self, command: JoinGroup, look: Look = nothing) -> None:
        """Become rank `rank_offset` + `rank` of the trainer's group.

        Joining again by the same arguments is no error. By others, or when the trainer of the
        old group is gone, a trainer has started again, and its group replaces the old one.
        look: what it raises ends the wait. Raises GroupError naming what is missing, by
        `timeout_s` whatever the peer does.
        """
        known = self._known(command.name)
        if known is not None and known[0] == command and known[1].is_alive():
            return
        self._check(command)
        if known is not None:
            logger.warning("group %s is joined anew; the old one is dropped", command.name)
            self.leave(command.name)
        started = time.monotonic()
        group = self._formed(command, look)
        group.look = nothing
        with self._lock:
            self._open[command.name] = (command, group)
        logger.info(
            "joined group %s of %d ranks at %s:%d in %.2f s",
            command.name,
            command.world_size,
            command.address,
            command.port,
            time.monotonic() - started,
        )

    def is_open(self, command: JoinGroup) -> bool:
        """Whether the group was joined by this command already, and not left."""
        known = self._known(command.name)
        return known is not None and known[0] == command

    def lend(self, name: str, memory: Sequence[torch.Tensor]) -> None:
        """Broadcasts of a group may write to `memory` from now on: should it be dropped, that is
        kept until they cannot any more."""
        with self._lock:
            self._memory[name] = memory

    def leave(self, name: str) -> bool:
        """Drop a group; no error when there is none. What is queued on it is lost. Whether nothing
        writes any more into what it was lent."""
        known, memory = self._pop(name)
        return known is None or self._park(known[1], memory)

    def drop(self, name: str) -> None:
        """`leave` a group that nothing is queued on, without waiting for its back end: NCCL takes
        up to a second to free a communicator."""
        known, memory = self._pop(name)
        if known is not None:
            parked = _Parked(known[1], memory)
            with self._lock:
                self._parked.append(parked)

    def _pop(self, name: str) -> tuple[tuple[JoinGroup, Group] | None, Sequence[torch.Tensor]]:
        with self._lock:
            return self._open.pop(name, None), self._memory.pop(name, ())

    def get(self, name: str) -> Group:
        """The group `name`. Raises GroupError when it was not joined or broke."""
        known = self._known(name)
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

    def senders(self, name: str) -> int:
        """Ranks of the group `name` that send by themselves; 0 of one for broadcasts."""
        self.get(name)
        return self._open[name][0].senders

    def own_ranks(self, name: str) -> range:
        """Ranks of the group `name` that are this engine's."""
        self.get(name)
        offset = self._open[name][0].rank_offset
        return range(offset, offset + self._mesh.size)

    def close(self) -> None:
        """Leave every group. Idempotent."""
        for name in self.names:
            self.leave(name)

    def _known(self, name: str) -> tuple[JoinGroup, Group] | None:
        with self._lock:
            return self._open.get(name)

    def _park(self, group: Group, memory: Sequence[torch.Tensor] = ()) -> bool:
        """Abort a group; keep it, and the memory, while its back end may still use them. Whether
        it uses them no more."""
        if group.abort():
            return True
        parked = _Parked(group, memory)
        with self._lock:
            self._parked.append(parked)
        return False

    def _check(self, command: JoinGroup) -> None:
        last = command.rank_offset + self._mesh.size - 1
        if command.rank_offset < max(1, command.senders) or last >= command.world_size:
            trainer = f"ranks 0 to {command.senders - 1}" if command.senders > 1 else "rank 0"
            raise GroupError(
                f"group {command.name!r} has world_size {command.world_size}, and rank_offset "
                f"{command.rank_offset} puts this engine's {self._mesh.size} rank(s) at "
                f"{command.rank_offset} to {last}; the trainer is {trainer}",
                field="world_size",
            )
        if command.senders and command.rendezvous == "vllm":
            raise GroupError(
                f"group {command.name!r} has {command.senders} senders: meet as 'torch' does",
                field="rendezvous",
            )
        if command.world_size > _MOST_RANKS:
            raise GroupError(
                f"world_size {command.world_size} is above {_MOST_RANKS}", field="world_size"
            )
        if not command.unique_id and not 0 < command.port < 1 << 16:
            raise GroupError(f"no port has the number {command.port}", field="port")
        if command.backend == "nccl" and self._device.type != "cuda":
            raise GroupError(
                f"group {command.name!r}: backend 'nccl' needs a GPU and this engine runs on the "
                "CPU; use 'gloo'",
                field="backend",
            )

    def _formed(self, command: JoinGroup, look: Look) -> Group:
        """The group, complete. What forms it may be stuck in a call into C++: a helper does."""
        deadline = time.monotonic() + capped(command.timeout_s)
        if self.num_parked >= _MOST_PARKED:
            raise GroupError(
                f"{_MOST_PARKED} groups that were dropped have not ended; wait for them, or "
                "start the engine again",
                field="name",
            )
        try:
            return self._helpers.call(
                lambda: self._connect(command, deadline, look),
                deadline + _GRACE_S,
                look,
                discard=self._park,
            )
        except TimeoutError as error:
            # What it waits for says nothing and heeds no deadline.
            raise trainer_store.nobody_answers(command, "it stopped answering") from error

    def _connect(self, command: JoinGroup, deadline: float, look: Look) -> Group:
        rank = command.rank_offset + self._mesh.rank
        helpers = self._helpers
        if command.rendezvous == "vllm":
            return vllm_group.join(command, rank, self._device, deadline, look, helpers, self._park)
        store = trainer_store.connect(command, deadline, look)
        if command.backend == "gloo" and command.senders:
            return GlooPairs(store, command, rank, deadline, look, helpers)
        if command.backend == "gloo":
            return GlooGroup.meet(store, command, rank, deadline, look, helpers)
        return NcclGroup.behind_store(store, command, rank, self._device, deadline, look, helpers)
