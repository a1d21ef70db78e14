"""Routes: which experts each token of a sequence was sent to.

Legend: P positions, L layers, K experts of a token.

Where a route is unknown it is absent, and every id of it is the largest number of the dtype, which
is no expert's.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from msgspec import Struct

from engine.protocol.types import Count, IntArray

RouteArray = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
"""Ids of experts, uint8 or uint16 (`route_dtype`)."""

RouteDType = Literal["int32", "uint16", "uint8"]
"""What ids are written as in replies; int32 marks an absent route by -1."""


def route_dtype(num_experts: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest dtype that holds the id of each expert and one number more, for absent ones."""
    return np.dtype(np.uint8 if num_experts <= np.iinfo(np.uint8).max else np.uint16)


class ExpertFacts(Struct, frozen=True, kw_only=True):
    """The experts of a model. num_layers: of all layers; layers: indices of those with experts,
    ascending. num_experts: of each such layer, of which a token is sent to `top_k`."""

    num_layers: Count
    layers: list[Count]
    num_experts: Count
    top_k: Count

    def absent(self, num_positions: int) -> RouteArray:
        """Absent routes [P, L, K] of layers with experts."""
        dtype = route_dtype(self.num_experts)
        return np.full(
            (num_positions, len(self.layers), self.top_k), np.iinfo(dtype).max, dtype=dtype
        )

    def spread(self, routes_PLK: RouteArray) -> RouteArray:
        """Routes of the layers with experts as those of all layers; the others have zeros."""
        if len(self.layers) == self.num_layers:
            return routes_PLK
        found = np.zeros((len(routes_PLK), self.num_layers, self.top_k), routes_PLK.dtype)
        found[:, self.layers] = routes_PLK
        return found


class RouteRead(Struct, frozen=True, kw_only=True):
    """Routes to read: those of `count` tokens from the `start`th on of those that `pages` (int32)
    hold, page after page."""

    pages: IntArray
    start: Count
    count: Count
