"""The experts of a layer: this rank's elements of all of them, in two tensors.

Ranks divide the experts (expert parallelism), each holding some of them whole, or every expert,
each holding a slice of its inner width. Either way what a rank holds gives a part of the output,
and the parts of all ranks add up to it.

Legend: T tokens, K experts of a token, H hidden size, I inner size of an expert on this rank,
J = 2 * I, S slots: experts that this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from engine.layers.kinds import MoeKind
from engine.layers.parameter import Fused, Part, Piece, Shard, ShardedParameter, even_shard
from engine.layers.runtime import LayerRuntime
from kernels.moe import Routed, run_experts


class ExpertWeight(nn.Module):
    """One tensor that has a matrix, or two, of each expert that this rank holds."""

    def __init__(self, weight: ShardedParameter) -> None:
        super().__init__()
        self.weight = weight


class Experts(nn.Module):
    """Gated MLPs with silu. `gate_up_proj` is [S, J, H], the rows of gate above those of up;
    `down_proj` is [S, H, I]. Checkpoints have a tensor for each matrix of each expert, or these
    two, of all experts and whole, which are the others one behind the other.

    Raises ModelError, naming the key of config.json, when the ranks do not divide what they are to.
    """

    def __init__(self, hidden_size: int, kind: MoeKind, *, runtime: LayerRuntime) -> None:
        super().__init__()
        self.backend = runtime.backend
        self.num_experts = kind.routing.num_experts
        self._slots, self._inner = _shards(kind, runtime)
        num, full, inner = self.num_experts, kind.intermediate_size, self._inner.length
        slots, hidden, names = self._slots.length, slice(0, hidden_size), kind.names
        # In the order of elements in a tensor of all experts: gate and up of one, then of the next.
        gate_up = {
            f"{expert}.{name}": Part(
                full_shape=(full, hidden_size),
                pieces=tuple(
                    Piece(
                        source=(self._held, hidden),
                        target=(slot, slice(place * inner, (place + 1) * inner), hidden),
                    )
                    for slot in self._slots_of(expert)
                ),
            )
            for expert in range(num)
            for place, name in enumerate((names.gate, names.up))
        }
        down = {
            f"{expert}.{names.down}": Part(
                full_shape=(hidden_size, full),
                pieces=tuple(
                    Piece(source=(hidden, self._held), target=(slot, hidden, slice(0, inner)))
                    for slot in self._slots_of(expert)
                ),
            )
            for expert in range(num)
        }
        self.gate_up_proj = _weight(
            (slots, 2 * inner, hidden_size),
            gate_up,
            {"gate_up_proj": Fused(shape=(num, 2 * full, hidden_size), keys=tuple(gate_up))},
            runtime,
        )
        self.down_proj = _weight(
            (slots, hidden_size, inner),
            down,
            {"down_proj": Fused(shape=(num, hidden_size, full), keys=tuple(down))},
            runtime,
        )

    @property
    def _held(self) -> slice:
        """What this rank holds of the inner size of an expert."""
        return slice(self._inner.start, self._inner.start + self._inner.length)

    def _slots_of(self, expert: int) -> Iterator[int]:
        """Where this rank holds an expert."""
        slot = expert - self._slots.start
        if 0 <= slot < self._slots.length:
            yield slot

    def forward(
        self,
        x_TH: torch.Tensor,
        routed: Routed,
        *,
        added_TH: torch.Tensor | None = None,
        residual_TH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's part of the experts' output, plus what is to be added to it and then to that:
        [T, H]."""
        return run_experts(
            x_TH,
            self.gate_up_proj.weight,
            self.down_proj.weight,
            routed.ids_TK,
            routed.weights_TK,
            first_slot=self._slots.start,
            added_TH=added_TH,
            residual_TH=residual_TH,
            num_experts=self.num_experts,
            backend=self.backend,
        )


def _shards(kind: MoeKind, runtime: LayerRuntime) -> tuple[Shard, Shard]:
    """This rank's experts, and its part of the inner size of each."""
    num, inner, mesh = kind.routing.num_experts, kind.intermediate_size, runtime.mesh
    if mesh.ep_size > 1:
        return even_shard(num, mesh, kind.count_key), Shard(0, inner)
    return Shard(0, num), even_shard(inner, mesh, kind.size_key)


def _weight(
    shape: tuple[int, ...],
    parts: dict[str, Part],
    fused: dict[str, Fused],
    runtime: LayerRuntime,
) -> ExpertWeight:
    storage = torch.empty(shape, dtype=runtime.dtype, device=runtime.device)
    return ExpertWeight(ShardedParameter(storage, parts, fused=fused))
