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
    slides_by_default: a `sliding_window` counts even without `use_sliding_window`.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None
    slides_by_default: bool = False
