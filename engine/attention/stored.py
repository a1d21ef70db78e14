"""A step as a model's layers see it, and steps whose keys and values another kernel writes: the
one that rotates them.

Legend: T tokens of the step, H query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from engine.attention.base import AttentionStep
from kernels.rotary import KVTarget


@runtime_checkable
class StoredStep(Protocol):
    """A step that says where its KV belongs, so that a kernel before it can put it there.

    What a back end offers besides `AttentionStep.attend`, if it keeps KV in the pool as it is.
    """

    def kv_target(self, layer_index: int) -> KVTarget:
        """The pages of one layer and the slots of the step's tokens."""
        ...

    def attend_stored(self, layer_index: int, q_THD: torch.Tensor) -> torch.Tensor:
        """`attend` without the write, which `kv_target` was filled for: [T, H, D]."""
        ...


@dataclass(frozen=True)
class ForwardContext:
    """What the layers of a model are told of a step; see `engine.layers.attention.StepContext`.

    positions_T: int64 [T].
    """

    positions_T: torch.Tensor
    step: AttentionStep

    def attend(
        self, layer_index: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """Write this step's K and V of a layer into the pool, then attend. Returns [T, H, D]."""
        return self.step.attend(layer_index, q_THD, k_TKD, v_TKD)

    def kv_target(self, layer_index: int) -> KVTarget | None:
        """Where the step's keys and values belong; None if only `attend` may write them."""
        return self.step.kv_target(layer_index) if isinstance(self.step, StoredStep) else None

    def attend_stored(self, layer_index: int, q_THD: torch.Tensor) -> torch.Tensor:
        """Attend with KV written to `kv_target`, which was not None."""
        assert isinstance(self.step, StoredStep)
        return self.step.attend_stored(layer_index, q_THD)
