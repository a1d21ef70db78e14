"""The routes of sampled replies, in the memory of the process that sampled them.

Trajectories are gathered to every process of a run; routes are not, since they are far more bytes
than tokens: a trajectory says where its own are, and a process fetches those of its share of an
update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from engine.protocol import RouteArray
from recipes.types import HeldRoutes
from recipes.world import World


@dataclass(kw_only=True)
class RouteShelf:
    """The routes that this process sampled, and those that it fetched."""

    world: World = field(default_factory=World)
    _own: dict[int, RouteArray] = field(default_factory=dict)
    _fetched: dict[tuple[int, int], RouteArray] = field(default_factory=dict)
    _next: int = 0

    def put(self, routes_TLK: RouteArray) -> HeldRoutes:
        """Keep an array until `keep` drops it."""
        key, self._next = self._next, self._next + 1
        self._own[key] = routes_TLK
        num, layers, top_k = routes_TLK.shape
        dtype = str(routes_TLK.dtype)
        return HeldRoutes(owner=self.world.rank, key=key, shape=(num, layers, top_k), dtype=dtype)

    def get(self, held: HeldRoutes) -> RouteArray:
        """The array, [T, L, K]: of this process's own, or of what the last `fetch` brought."""
        if held.owner == self.world.rank:
            return self._own[held.key]
        return self._fetched[held.owner, held.key]

    def keep(self, held: Iterable[HeldRoutes | None]) -> None:
        """Drop every array but these."""
        mine = {h.key for h in held if h is not None and h.owner == self.world.rank}
        self._own = {key: routes for key, routes in self._own.items() if key in mine}
        self._fetched = {}

    def fetch(self, wanted: Sequence[Sequence[HeldRoutes | None]]) -> None:
        """Bring what this process lacks of `wanted[rank]`; collective, with equal arguments.

        Two processes exchange one message in each direction where there is anything to send.
        """
        self._fetched = {}
        if self.world.size == 1:
            return
        rank, messages = self.world.rank, []
        # Kept until they are sent.
        outbound: list[torch.Tensor] = []
        inbound: list[tuple[list[HeldRoutes], torch.Tensor]] = []
        for other in range(self.world.size):
            outgoing, incoming = _of(wanted[other], rank), _of(wanted[rank], other)
            if other != rank and outgoing:
                outbound.append(self._packed(outgoing))
                messages.append(dist.isend(outbound[-1], other))
            if other != rank and incoming:
                size = sum(held.num_bytes for held in incoming)
                inbound.append((incoming, torch.empty(size, dtype=torch.uint8)))
                messages.append(dist.irecv(inbound[-1][1], other))
        for message in messages:
            assert message is not None
            message.wait()
        for incoming, payload in inbound:
            self._unpack(incoming, payload)

    def _packed(self, outgoing: Sequence[HeldRoutes]) -> torch.Tensor:
        arrays = [np.ascontiguousarray(self._own[held.key]) for held in outgoing]
        return torch.from_numpy(np.concatenate([a.view(np.uint8).reshape(-1) for a in arrays]))

    def _unpack(self, incoming: Sequence[HeldRoutes], payload: torch.Tensor) -> None:
        start = 0
        for held in incoming:
            raw = payload[start : start + held.num_bytes].numpy()
            self._fetched[held.owner, held.key] = raw.view(held.dtype).reshape(held.shape)
            start += held.num_bytes


def _of(wanted: Sequence[HeldRoutes | None], owner: int) -> list[HeldRoutes]:
    """Those that one process keeps, once each, in order."""
    return list(dict.fromkeys(h for h in wanted if h is not None and h.owner == owner))
