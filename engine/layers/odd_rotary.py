"""In place of `Rotary` in layers whose heads do not turn, or not whole. What the one kernel does of
heads that do is done by several here: norms, rotation, and the write of keys and values.

Legend: T tokens, H query heads, K KV heads, D head dim, C columns of a fused query, key and value
projection.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.config import KernelBackend
from kernels.kv_copy import write_kv
from kernels.norm import rms_norm
from kernels.rotary import HeadNorms, KVTarget

Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(queries [T, H, D], keys [T, K, D], positions int [T]) -> both, turned."""


class NoRotary:
    """Queries and keys stay as they are (NoPE, Kazemnejad et al. 2023, arXiv:2305.19466)."""

    def __init__(self, backend: KernelBackend) -> None:
        self.backend = backend

    def __call__(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The arguments themselves."""
        return q_THD, k_TKD

    def store(
        self,
        qkv_TC: torch.Tensor,
        positions_T: torch.Tensor,
        target: KVTarget,
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        """`Rotary.store` without the rotation."""
        return _store(self, qkv_TC, positions_T, target, norms, self.backend)


class PartialRotary:
    """The first dims of each head turn, as a head of so many dims does; the rest stay.

    rotary: turns `width` dims.
    """

    def __init__(self, rotary: Turn, width: int, backend: KernelBackend) -> None:
        self.rotary = rotary
        self.width = width
        self.backend = backend

    def __call__(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries [T, H, D] and keys [T, K, D] by their positions, int [T]."""
        turned = self.rotary(q_THD[..., : self.width], k_TKD[..., : self.width], positions_T)
        rest = (q_THD[..., self.width :], k_TKD[..., self.width :])
        q_THD, k_TKD = (torch.cat(both, dim=-1) for both in zip(turned, rest, strict=True))
        return q_THD, k_TKD

    def store(
        self,
        qkv_TC: torch.Tensor,
        positions_T: torch.Tensor,
        target: KVTarget,
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        """See `Rotary.store`."""
        return _store(self, qkv_TC, positions_T, target, norms, self.backend)


def _store(
    turn: Turn,
    qkv_TC: torch.Tensor,
    positions_T: torch.Tensor,
    target: KVTarget,
    norms: HeadNorms | None,
    backend: KernelBackend,
) -> torch.Tensor:
    kv_heads, head_dim = target.k_pages_NGKD.shape[2:]
    heads_TCD = qkv_TC.unflatten(-1, (-1, head_dim))
    num_heads = heads_TCD.shape[1] - 2 * kv_heads
    q_THD, k_TKD, v_TKD = heads_TCD.split([num_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q_THD, k_TKD = (
            rms_norm(x, weight, norms.eps, weighting=norms.weighting, backend=backend)
            for x, weight in ((q_THD, norms.q_weight_D), (k_TKD, norms.k_weight_D))
        )
    q_THD, k_TKD = turn(q_THD, k_TKD, positions_T)
    pages = (target.k_pages_NGKD, target.v_pages_NGKD)
    write_kv(k_TKD, v_TKD, *pages, target.slots_T, scales=target.scales, backend=backend)
    return q_THD
