"""Which experts each token was sent to, kept like its KV.

Legend: T rows of a step, N pages, G tokens of a page, L layers with experts, K experts of a token,
P positions that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.protocol import ExpertFacts, RouteArray, RouteRead, route_dtype
from engine.transfer import Fetch, to_device
from kernels.kv_copy import copy_pages

_STORED = {1: torch.uint8, 2: torch.int16}
"""By the bytes of an id. torch computes with few dtypes that are unsigned; the bits are the same,
and -1, which a row has that only fills a graph, is the largest unsigned number."""


@dataclass(frozen=True)
class ReadRoutes:
    """Routes on their way to the host, in the bits of `dtype`."""

    fetch: Fetch
    dtype: np.dtype[np.unsignedinteger]

    def numpy(self) -> RouteArray:
        """[P, L, K]; waits for the copy."""
        found: RouteArray = self.fetch.numpy().view(self.dtype)
        return found


class RoutePool:
    """Ids [N, G, L, K] of one rank: the route of a token lies where its KV does, so whoever shares
    a page shares the routes in it, and a page is copied with them.

    The experts of a token are few bytes, and those of all its layers lie next to each other: what a
    sequence returns is gathered row by row, and a step writes its rows at once.
    """

    def __init__(
        self, facts: ExpertFacts, *, num_pages: int, page_size: int, device: torch.device
    ) -> None:
        self._dtype = route_dtype(facts.num_experts)
        self._place = {layer: place for place, layer in enumerate(facts.layers)}
        shape = (num_pages, page_size, len(facts.layers), facts.top_k)
        self._pages_NGLK = torch.zeros(shape, dtype=_STORED[self._dtype.itemsize], device=device)

    @property
    def tensor(self) -> torch.Tensor:
        """All of it."""
        return self._pages_NGLK

    def step(self, slots_T: torch.Tensor) -> StepRoutes:
        """Where the model's layers leave the routes of a step. slots_T: int64, page * G + offset,
        where the rows belong."""
        return StepRoutes(self, slots_T)

    def is_last(self, layer_index: int) -> bool:
        """Whether no layer behind it has experts."""
        return self._place[layer_index] == len(self._place) - 1

    def write(self, slots_T: torch.Tensor, ids_TLK: torch.Tensor) -> None:
        """Store the ids of all layers with experts, of any integer dtype."""
        rows = self._pages_NGLK.flatten(0, 1)
        rows.index_copy_(0, slots_T, ids_TLK.to(rows.dtype))

    def copy(self, src_C: torch.Tensor, dst_C: torch.Tensor) -> None:
        """Copy whole pages; as `KVPool.copy`."""
        copy_pages([self._pages_NGLK[None]], src_C, dst_C)

    def read(self, reads: Sequence[RouteRead]) -> ReadRoutes:
        """Queue one gather of all that is read, and one copy of it to the host."""
        page_size = self._pages_NGLK.shape[1]
        places = np.concatenate([_places(read, page_size) for read in reads])
        rows = self._pages_NGLK.flatten(0, 1)
        found = rows.index_select(0, to_device(places, rows.device))
        return ReadRoutes(Fetch(found), self._dtype)


def route_page_bytes(facts: ExpertFacts, page_size: int) -> int:
    """Bytes of a page."""
    ids = page_size * len(facts.layers) * facts.top_k
    return ids * route_dtype(facts.num_experts).itemsize


class StepRoutes:
    """Takes the routes of one step (`engine.layers.route_sink.RouteSink`) and stores them with the
    last: one kernel for all layers, and none for each."""

    def __init__(self, pool: RoutePool, slots_T: torch.Tensor) -> None:
        self._pool = pool
        self._slots_T = slots_T
        self._ids_TK: list[torch.Tensor] = []

    def take(self, layer_index: int, ids_TK: torch.Tensor) -> None:
        """See `RouteSink`. Held until the last layer's came."""
        self._ids_TK.append(ids_TK)
        if self._pool.is_last(layer_index):
            self._pool.write(self._slots_T, torch.stack(self._ids_TK, dim=1))
            self._ids_TK.clear()


def _places(read: RouteRead, page_size: int) -> np.ndarray:
    """The rows that a read names, int64 [count]."""
    offsets = np.arange(page_size, dtype=np.int64)
    places = (read.pages.astype(np.int64)[:, None] * page_size + offsets).reshape(-1)
    found: np.ndarray = places[read.start : read.start + read.count]
    return found
