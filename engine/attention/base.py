"""What an attention back end is: it prepares one step once, then attends layer by layer.

Legend: T tokens of the step, R rows, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class AttentionBatch:
    """Where the rows of one step keep their KV. Row r computes tokens
    [query_start[r], query_start[r + 1]) of the step, the last of its `kv_lens[r]`.

    query_start_R1, kv_lens_R, slots_R: int64 on the host. host_pages: int32 [slots, P] on the
    host; page_table: the same on the device. write_slots_T: int64 [T] on the device, the
    place of each token in the pool (page * page_size + offset).
    """

    query_start_R1: np.ndarray
    kv_lens_R: np.ndarray
    slots_R: np.ndarray
    host_pages: np.ndarray
    page_table: torch.Tensor
    write_slots_T: torch.Tensor
    page_size: int
    device: torch.device

    @property
    def query_lens_R(self) -> np.ndarray:
        return np.diff(self.query_start_R1)


class AttentionStep(Protocol):
    """One prepared step."""

    def attend(
        self, layer_index: int, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """Write K and V of every token, then attend causally. Returns [T, H, D]."""
        ...


class AttentionBackend(Protocol):
    """Builds steps over one KV pool."""

    name: str

    def prepare(self, batch: AttentionBatch) -> AttentionStep:
        """Everything that is equal for all layers of a step."""
        ...
