"""What tells one dense decoder architecture from another. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the common decoder that an architecture fixes or its configuration sets.

    qkv_bias, o_bias: biases of the attention's input and output projections.
    mlp_bias: biases of the MLP's projections.
    qk_norm: per-head norms of queries and keys before the rotary embedding.
    default_head_dim: head dim of a configuration without one; None is hidden size / heads.
    default_window: the `sliding_window` of a configuration without one, where it counts even
        without `use_sliding_window`; None where that switch decides.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None
    default_window: int | None = None
