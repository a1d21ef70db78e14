"""What the layers of a decoder can be made of: plain data, one class for each kind of block.

A family's page (`engine/models/`) names the kinds of its layers one by one;
`engine/layers/layer_blocks.py` has the module of each kind. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.layers.rope_config import RopeConfig
from kernels.routing import RoutingRule
from kernels.weighting import Weighting

Activation = Literal["silu", "gelu_tanh"]
QKNorm = Literal["none", "head", "projection"]
"""Norms of queries and keys: none, one over each head, or one over all heads together."""
NormPlace = Literal["before", "after", "both"]
"""Where a layer has its norms: before attention and MLP (Llama), after them and before their sum
with the residual (OLMo 2), or in both places (Gemma)."""


@dataclass(frozen=True, kw_only=True)
class NormKind:
    """RMS norms of one epsilon; `weighting`: see `kernels.norm`."""

    eps: float
    weighting: Weighting = "rounded"


@dataclass(frozen=True, kw_only=True)
class AttentionKind:
    """Grouped-query attention.

    scale: what scores are multiplied by. window: positions that a query sees, its own the last of
    them; None for all before it. rope: None leaves queries and keys as they are. rope_wide: rotate
    in float32; see `kernels.rotary`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None
    norm: NormKind
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    window: int | None = None
    rope_wide: bool = False


@dataclass(frozen=True, kw_only=True)
class DenseMLPKind:
    """One gated MLP that every token goes through.

    size_key: the key of config.json that its size comes from, for the error of ranks that do not
    divide it.
    """

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False
    size_key: str = "intermediate_size"


@dataclass(frozen=True, kw_only=True)
class SharedExpertKind:
    """An MLP beside the experts, whose output is added to theirs.

    name: of its module. gated: its output is multiplied by the sigmoid of one number a token, a
    product with the weight of a module called `name` and "_gate".
    """

    name: str
    mlp: DenseMLPKind
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What checkpoints call the modules of a mixture: the whole, and the matrices of an expert."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class MoeKind:
    """A mixture of experts: gated MLPs with silu, of which each token goes through a few.

    routing: how they are chosen and weighed. intermediate_size: of each expert.
    chosen_by_bias: a float32 bias for each expert is added to the scores that choose.
    count_key, size_key: the keys of config.json that their number and size come from.
    """

    routing: RoutingRule
    intermediate_size: int
    shared: SharedExpertKind | None = None
    chosen_by_bias: bool = False
    names: ExpertNames = ExpertNames()
    count_key: str = "num_experts"
    size_key: str = "moe_intermediate_size"

    @property
    def bias(self) -> bool:
        """Experts have no biases."""
        return False


MLPKind = DenseMLPKind | MoeKind


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """One decoder layer."""

    hidden_size: int
    norm_place: NormPlace
    norm: NormKind
    attention: AttentionKind
    mlp: MLPKind
