"""What this rank receives from every trainer rank, planned once and used by update after update."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.errors import ManifestMismatch
from engine.protocol import (
    Block,
    Blocks,
    Message,
    PlanExcerpts,
    RankExcerpts,
    TensorPiece,
    TensorSpec,
    pair_stages,
)
from engine.weights import verify
from engine.weights.catalog import Catalog
from engine.weights.coverage import Coverage
from engine.weights.excerpts import block_of
from engine.weights.layouts import torch_dtype
from engine.weights.units import Origin


@dataclass(frozen=True)
class PlannedUnit:
    """A unit as this rank receives it.

    shape: of what comes, its excerpt or all of it. origin: the fused tensor that it is part of.
    alone: whether the update brings its parameter's part under this name only.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_excerpt: bool
    origin: Origin | None
    alone: bool

    @property
    def size(self) -> int:
        """Elements that come."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedStage:
    """Tensors that come together.

    units: of each of them by its number, those of which something comes, in the order of its
    blocks. absent: those of which this rank needs nothing. messages: with the trainer ranks that
    send them, in their order.
    """

    first_name: str
    units: dict[int, list[PlannedUnit]]
    absent: list[PlannedUnit]
    messages: list[tuple[int, Message]]


@dataclass(frozen=True)
class ExcerptPlan:
    """Everything about the updates of one `PlanExcerpts` that does not change between them."""

    command: PlanExcerpts
    needs: RankExcerpts
    stages: list[PlannedStage] = field(default_factory=list)

    @property
    def tensors(self) -> Sequence[TensorPiece]:
        """Whole tensors, in the order in which they come."""
        return self.command.tensors


def plan_excerpts(command: PlanExcerpts, catalog: Catalog) -> ExcerptPlan:
    """Raises ManifestMismatch for tensors that are not of this model, and for shares that are not
    every element once."""
    specs = [TensorSpec(piece.name, piece.dtype, piece.shape) for piece in command.tensors]
    verify.announced_tensors(specs, catalog, partial=True)
    _check_shares(command)
    planned = [_tensor(piece, command, catalog) for piece in command.tensors]
    needs = RankExcerpts(tensors=[blocks for _, blocks in planned])
    units = _named_alone([units for units, _ in planned], catalog)
    pairs = [pair_stages(command, sender, needs) for sender in range(len(command.shares))]
    stages = []
    for same in zip(*pairs, strict=True):
        first, last = same[0].first, same[0].last
        numbers = range(first, last)
        stages.append(
            PlannedStage(
                first_name=command.tensors[first].name,
                units={n: [unit for unit in units[n] if unit.size] for n in numbers},
                absent=[unit for n in numbers for unit in units[n] if not unit.size],
                messages=[
                    (s, message) for s, stage in enumerate(same) for message in stage.messages
                ],
            )
        )
    return ExcerptPlan(command, needs, stages)


def _tensor(
    piece: TensorPiece, command: PlanExcerpts, catalog: Catalog
) -> tuple[list[PlannedUnit], Blocks]:
    """The units of a tensor, and the blocks of those of which something comes."""
    dtype = torch_dtype(piece.dtype, piece.name)
    units: list[PlannedUnit] = []
    blocks: list[Block] = []
    begin = 0
    for name in catalog.units(piece.name):
        full = catalog.shape(name) if catalog.is_needed(name) else tuple(piece.shape)
        needed = catalog.excerpt(name, dtype)
        excerpt = None if command.whole and catalog.is_needed(name) else needed
        ranges = tuple((0, size) for size in full) if excerpt is None else excerpt.ranges
        shape = tuple(last - first for first, last in ranges)
        origin = Origin(piece.name, begin) if catalog.is_fused(piece.name) else None
        unit = PlannedUnit(name, dtype, shape, excerpt is not None, origin, True)
        units.append(unit)
        if unit.size:
            blocks.append(block_of(ranges, full, begin))
        begin += math.prod(full)
    return units, blocks


def _named_alone(units: list[list[PlannedUnit]], catalog: Catalog) -> list[list[PlannedUnit]]:
    """The same, those that come under a second name too marked so."""
    times = Counter(catalog.canonical(unit.name) for some in units for unit in some)
    if len(times) == sum(times.values()):
        return units
    return [
        [
            PlannedUnit(u.name, u.dtype, u.shape, u.is_excerpt, u.origin, False)
            if times[catalog.canonical(u.name)] > 1
            else u
            for u in some
        ]
        for some in units
    ]


def _check_shares(command: PlanExcerpts) -> None:
    """Raise ManifestMismatch unless the shares are every element of every tensor once."""
    came = [Coverage(piece.name, math.prod(piece.shape)) for piece in command.tensors]
    for shares in command.shares:
        for number, start, stop in shares:
            if number >= len(came):
                raise ManifestMismatch(
                    f"a share is of tensor {number}, and {len(came)} were named", field="shares"
                )
            came[number].add(start, stop)
    for piece, coverage in zip(command.tensors, came, strict=True):
        missing = coverage.missing
        if missing is not None and missing[0] < missing[1]:
            raise ManifestMismatch(
                f"no trainer rank sends elements [{missing[0]}, {missing[1]}) of {piece.name}",
                field=piece.name,
            )
