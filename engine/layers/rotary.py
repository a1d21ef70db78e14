"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) with context extension.

Legend: T tokens, H query heads, K KV heads, D head dim, M positions of the table, C columns of
a fused query, key and value projection.
"""

from __future__ import annotations

import math

import torch

from engine.config import KernelBackend
from engine.layers.kinds import AttentionKind
from engine.layers.odd_rotary import NoRotary, PartialRotary
from engine.layers.rope_config import RopeConfig
from engine.layers.runtime import LayerRuntime
from kernels.rotary import HeadNorms, KVTarget, apply_rotary, rotate_and_store


def _base_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (rope.theta**exponents)


def _llama3_frequencies(rope: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    turns = rope.original_max_position * base / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = ramp.clamp(0, 1)
    return (1 - ramp) * base / rope.factor + ramp * base


def _yarn_frequencies(rope: RopeConfig, base: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): interpolate only the slow dimensions."""

    def dimension_of(turns: float) -> float:
        context = rope.original_max_position
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Equal bounds would divide by zero; the ramp then becomes a step.
    width = high - low if high != low else 0.001
    dims = torch.arange(head_dim // 2, dtype=torch.float32)
    interpolated = ((dims - low) / width).clamp(0, 1)
    return base / rope.factor * interpolated + base * (1 - interpolated)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angle per position of each dimension pair, float32 [D/2], and the scale of cos and sin."""
    frequencies = _base_frequencies(rope, head_dim)
    scale = 1.0
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.rope_type == "llama3":
        frequencies = _llama3_frequencies(rope, frequencies)
    elif rope.rope_type == "yarn":
        frequencies = _yarn_frequencies(rope, frequencies, head_dim)
        scale = _yarn_attention_factor(rope)
    if rope.frequency_divisors is not None:
        frequencies = frequencies / torch.tensor(rope.frequency_divisors, dtype=torch.float32)
    return frequencies, scale


class Rotary:
    """A cos/sin table, one for all layers of a model that rotate alike.

    wide: rotate in float32; see `kernels.rotary`.
    cos_sin_MD: float32 [M, D], cosines in the first half of D and sines in the second.
    """

    def __init__(
        self,
        rope: RopeConfig,
        head_dim: int,
        max_position: int,
        *,
        device: torch.device,
        backend: KernelBackend,
        wide: bool = False,
    ) -> None:
        self.backend = backend
        self.wide = wide
        frequencies, scale = inverse_frequencies(rope, head_dim)
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
        table = torch.cat([angles.cos(), angles.sin()], dim=-1) * scale
        self.cos_sin_MD = table.to(device)

    def __call__(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries [T, H, D] and keys [T, K, D] by their positions, int [T]."""
        return apply_rotary(
            q_THD, k_TKD, positions_T, self.cos_sin_MD, wide=self.wide, backend=self.backend
        )

    def store(
        self,
        qkv_TC: torch.Tensor,
        positions_T: torch.Tensor,
        target: KVTarget,
        norms: HeadNorms | None,
    ) -> torch.Tensor:
        """Normalise and rotate the heads of a fused projection and write its K and V to their
        pages, in one kernel; returns the queries [T, H, D]."""
        return rotate_and_store(
            qkv_TC,
            positions_T,
            self.cos_sin_MD,
            target,
            norms=norms,
            wide=self.wide,
            backend=self.backend,
        )


AnyRotary = Rotary | NoRotary | PartialRotary


class RotaryTables:
    """The tables of one model, each built once."""

    def __init__(self, max_position: int, runtime: LayerRuntime) -> None:
        self._max_position = max_position
        self._runtime = runtime
        self._tables: dict[tuple[RopeConfig | None, int, bool], AnyRotary] = {}

    def of(self, attention: AttentionKind) -> AnyRotary:
        """What rotates the queries and keys of layers of this kind."""
        key = (attention.rope, attention.head_dim, attention.rope_wide)
        if key not in self._tables:
            self._tables[key] = self._build(attention)
        return self._tables[key]

    def _build(self, attention: AttentionKind) -> AnyRotary:
        runtime = self._runtime
        if attention.rope is None:
            return NoRotary(runtime.backend)
        turned = attention.rope.num_turned(attention.head_dim)
        rotary = Rotary(
            attention.rope,
            turned,
            self._max_position,
            device=runtime.device,
            backend=runtime.backend,
            wide=attention.rope_wide,
        )
        if turned < attention.head_dim:
            return PartialRotary(rotary, turned, runtime.backend)
        return rotary
