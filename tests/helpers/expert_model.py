"""A made-up layer of experts, whose weights have a name each and one name for all of a kind.

A rank holds some of the experts, one of them twice, and a slice of each; gate and up rows lie in
turn or one behind the other. What it stores is compared with `expected`, which is written down
without the code that places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from engine.layers.parameter import Fused, Part, Piece, ShardedParameter, whole
from engine.models.full_names import FusedTensor, Target, full_tensors, fused_tensors

EXPERTS, HIDDEN, INNER = 4, 6, 8
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """What a rank holds. slots: the expert of each. rows: of the inner size. turns: whether gate
    and up rows lie in turn."""

    slots: Sequence[int] = (0, 1, 2, 3)
    rows: slice = field(default_factory=lambda: slice(0, INNER))
    turns: bool = False

    @property
    def count(self) -> int:
        return len(range(INNER)[self.rows])

    def rows_of(self, kind: str) -> slice:
        """Rows of the stored gate and up matrix."""
        first = 0 if kind == "gate_proj" else 1
        if self.turns:
            return slice(first, 2 * self.count, 2)
        return slice(first * self.count, (first + 1) * self.count)


class _Holder(nn.Module):
    def __init__(self, weight: ShardedParameter) -> None:
        super().__init__()
        self.weight = weight


class ExpertModel(nn.Module):
    """`Loadable`: the experts of one layer, and a norm."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        slots, count = len(place.slots), place.count
        experts = nn.Module()
        experts.w13 = _Holder(self._gate_up(torch.zeros(slots, 2 * count, HIDDEN)))
        experts.w2 = _Holder(self._down(torch.zeros(slots, HIDDEN, count)))
        self.mlp = nn.Module()
        self.mlp.experts = experts
        self.norm = _Holder(ShardedParameter(torch.zeros(HIDDEN), whole((HIDDEN,))))

    def _slots_of(self, expert: int) -> list[int]:
        return [slot for slot, held in enumerate(self.place.slots) if held == expert]

    def _gate_up(self, storage: torch.Tensor) -> ShardedParameter:
        hidden, keys, parts = slice(0, HIDDEN), [], {}
        for expert in range(EXPERTS):
            for kind in ("gate_proj", "up_proj"):
                key = f"{expert}.{kind}"
                rows = self.place.rows_of(kind)
                parts[key] = Part(
                    full_shape=(INNER, HIDDEN),
                    pieces=tuple(
                        Piece(source=(self.place.rows, hidden), target=(slot, rows, hidden))
                        for slot in self._slots_of(expert)
                    ),
                )
                keys.append(key)
        shape = (EXPERTS, 2 * INNER, HIDDEN)
        fused = {"gate_up_proj": Fused(shape=shape, keys=tuple(keys))}
        return ShardedParameter(storage, parts, fused=fused)

    def _down(self, storage: torch.Tensor) -> ShardedParameter:
        hidden = slice(0, HIDDEN)
        parts = {
            f"{expert}.down_proj": Part(
                full_shape=(HIDDEN, INNER),
                pieces=tuple(
                    Piece(
                        source=(hidden, self.place.rows),
                        target=(slot, hidden, slice(0, self.place.count)),
                    )
                    for slot in self._slots_of(expert)
                ),
            )
            for expert in range(EXPERTS)
        }
        fused = {"down_proj": Fused(shape=(EXPERTS, HIDDEN, INNER), keys=tuple(parts))}
        return ShardedParameter(storage, parts, fused=fused)

    def weight_index(self) -> dict[str, Target]:
        return full_tensors(self)

    def fused(self) -> dict[str, FusedTensor]:
        return fused_tensors(self)

    def aliases(self) -> Mapping[str, str]:
        return {}

    def ignored_names(self) -> frozenset[str]:
        return frozenset()

    def storages(self) -> dict[str, torch.Tensor]:
        """All that is stored, as it is now."""
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def drawn(seed: int) -> Tensors:
    """Full tensors under the fused names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        GATE_UP: (EXPERTS, 2 * INNER, HIDDEN),
        DOWN: (EXPERTS, HIDDEN, INNER),
        "norm.weight": (HIDDEN,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def each(fused: Tensors) -> Tensors:
    """The same under a name each, in another order."""
    found = {"norm.weight": fused["norm.weight"]}
    for expert in reversed(range(EXPERTS)):
        prefix = f"mlp.experts.{expert}"
        found[f"{prefix}.down_proj.weight"] = fused[DOWN][expert]
        found[f"{prefix}.up_proj.weight"] = fused[GATE_UP][expert, INNER:]
        found[f"{prefix}.gate_proj.weight"] = fused[GATE_UP][expert, :INNER]
    return found


def mixed(fused: Tensors) -> Tensors:
    """Gate and up in one, the rest under a name each."""
    single = {name: t for name, t in each(fused).items() if "gate" not in name and "up" not in name}
    return {**single, GATE_UP: fused[GATE_UP]}


def expected(place: Place, fused: Tensors) -> Tensors:
    """What a rank stores."""
    stored = {
        "mlp.experts.w13.weight": torch.zeros(len(place.slots), 2 * place.count, HIDDEN),
        "mlp.experts.w2.weight": torch.zeros(len(place.slots), HIDDEN, place.count),
        "norm.weight": fused["norm.weight"],
    }
    rows = range(INNER)[place.rows]
    for slot, expert in enumerate(place.slots):
        for at, row in enumerate(rows):
            gate, up = fused[GATE_UP][expert, row], fused[GATE_UP][expert, INNER + row]
            first, second = (2 * at, 2 * at + 1) if place.turns else (at, place.count + at)
            stored["mlp.experts.w13.weight"][slot, first] = gate
            stored["mlp.experts.w13.weight"][slot, second] = up
            stored["mlp.experts.w2.weight"][slot, :, at] = fused[DOWN][expert, :, row]
    return stored


def cut(tensors: Tensors, seed: int) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of flat pieces that cover every tensor once, in any order."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for name, tensor in tensors.items():
        size = tensor.numel()
        marks = torch.randint(0, size + 1, (3,), generator=generator).tolist()
        edges = [0, *sorted(marks), size]
        pieces += [(name, a, b) for a, b in pairwise(edges) if a < b]
    for index in torch.randperm(len(pieces), generator=generator).tolist():
        yield pieces[index]
