"""A step as a model's layers see it, and where a step's keys and values go.

Legend: T tokens of the step, H query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.base import AttentionStep, NewHeads
from engine.kv.layout import head_pages
from engine.kv.pool import KVPool
from engine.layers.route_sink import RouteSink
from kernels.rotary import KVTarget


@dataclass(frozen=True)
class PoolWrites:
    """`KVWrites` of every back end that takes KV as it comes.

    slots_T: int64, the place of each token in the pool (page * page_size + offset).
    """

    pool: KVPool
    slots_T: torch.Tensor

    def target(self, layer_index: int) -> KVTarget:
        """The pages of one layer and the slots of the step's tokens."""
        k_NGKD, v_NGKD, scales = head_pages(self.pool.layer(layer_index))
        return KVTarget(k_NGKD, v_NGKD, self.slots_T, scales)

    def store(self, layer_index: int, heads: NewHeads) -> torch.Tensor:
        """See `KVWrites`."""
        return heads.store(self.target(layer_index))


@dataclass(frozen=True)
class ForwardContext:
    """What the layers of a model are told of a step; see `engine.layers.attention.StepContext`.

    positions_T: int64 [T].
    """

    positions_T: torch.Tensor
    step: AttentionStep
    num_rows: torch.Tensor | None = None
    routes: RouteSink | None = None

    def attend(self, layer_index: int, heads: NewHeads) -> torch.Tensor:
        """Write this step's K and V of a layer into the pool, then attend. Returns [T, H, D]."""
        return self.step.attend(layer_index, self.step.writes.store(layer_index, heads))
