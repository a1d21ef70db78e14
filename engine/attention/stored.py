"""Steps whose keys and values another kernel writes: the one that rotates them.

Legend: T tokens of the step, H query heads, D head dim.
"""

from __future__ import annotations

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


def kv_target(step: AttentionStep, layer_index: int) -> KVTarget | None:
    """Where the step's keys and values belong; None if only its `attend` may write them."""
    return step.kv_target(layer_index) if isinstance(step, StoredStep) else None


def attend_stored(step: AttentionStep, layer_index: int, q_THD: torch.Tensor) -> torch.Tensor:
    """Attend with KV written to `kv_target`, which was not None."""
    assert isinstance(step, StoredStep)
    return step.attend_stored(layer_index, q_THD)
