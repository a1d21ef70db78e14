"""The sizes that every family has, and the kinds of layers that a page makes of them.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.layers.kinds import (
    Activation,
    AttentionKind,
    DenseMLPKind,
    LayerKind,
    MoeKind,
    NormKind,
    NormPlace,
    QKNorm,
)
from engine.layers.rope_config import RopeConfig
from kernels.weighting import Weighting


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one model, elements; `positions`: tokens of context that are served.

    rope: the settings that a family has for all its layers alike.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    positions: int
    rope: RopeConfig

    def norm(self, weighting: Weighting = "rounded") -> NormKind:
        """The model's norms."""
        return NormKind(eps=self.rms_norm_eps, weighting=weighting)

    def layer(
        self,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: QKNorm = "none",
        norm_place: NormPlace = "before",
        weighting: Weighting = "rounded",
        activation: Activation = "silu",
        rope_wide: bool = False,
        scale: float | None = None,
    ) -> LayerKind:
        """A layer with grouped-query attention over everything before, and one gated MLP.

        scale: of the attention's scores; None is head_dim ** -0.5.
        """
        norm = self.norm(weighting)
        attention = AttentionKind(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5 if scale is None else scale,
            rope=self.rope,
            norm=norm,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            rope_wide=rope_wide,
        )
        mlp = DenseMLPKind(
            intermediate_size=self.intermediate_size, activation=activation, bias=mlp_bias
        )
        return LayerKind(
            hidden_size=self.hidden_size,
            norm_place=norm_place,
            norm=norm,
            attention=attention,
            mlp=mlp,
        )

    def mixed(self, layer: LayerKind, experts: MoeKind, sparse: Sequence[bool]) -> list[LayerKind]:
        """Such layers, those that are `sparse` with experts in place of their MLP."""
        moe = replace(layer, mlp=experts)
        return [moe if has_experts else layer for has_experts in sparse]

    def alike(self, layer: LayerKind) -> tuple[LayerKind, ...]:
        """A model of such layers only."""
        return (layer,) * self.num_layers

    def windowed(
        self, layers: Sequence[LayerKind], windows: Sequence[int | None]
    ) -> tuple[LayerKind, ...]:
        """The same layers, each with its window; one that no context exceeds is none."""
        return tuple(
            replace(layer, attention=replace(layer.attention, window=self._served(window)))
            for layer, window in zip(layers, windows, strict=True)
        )

    def _served(self, window: int | None) -> int | None:
        return None if window is None or window >= self.positions else window
