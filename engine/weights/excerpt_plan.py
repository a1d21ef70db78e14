"""What this rank receives from every trainer rank, planned once and used by update after update."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.errors import ManifestMismatch
from engine.protocol import (
    Block,
    Blocks,
    Message,
    Part,
    PlanExcerpts,
    RankExcerpts,
    TensorPiece,
    TensorSpec,
    cuts_of,
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

    shape, size: of what comes, its excerpt or all of it. origin: the fused tensor that it is part
    of. alone: whether the update brings its parameter's part under this name only.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int
    is_excerpt: bool
    origin: Origin | None
    alone: bool


@dataclass(frozen=True)
class PlannedMessage:
    """A message from trainer rank `source`. dtype: of all its parts, which `sizes` and `picks` cut
    it into (`cuts_of`); None where they differ."""

    source: int
    num_bytes: int
    parts: tuple[Part, ...]
    dtype: torch.dtype | None
    sizes: list[int]
    picks: list[int]

    def cut(self, buffer: torch.Tensor, dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
        """The elements of each part; dtypes: of the tensors by their number."""
        if self.dtype is not None:
            runs = buffer.view(self.dtype).split_with_sizes(self.sizes)
            return [runs[pick] for pick in self.picks]
        found = []
        for part in self.parts:
            dtype = dtypes[part.tensor]
            end = part.offset + (part.stop - part.start) * dtype.itemsize
            found.append(buffer[part.offset : end].view(dtype))
        return found


@dataclass(frozen=True)
class PlannedStage:
    """Tensors that come together.

    units: of each of them by its number, those of which something comes, in the order of its
    blocks. absent: those of which this rank needs nothing. messages: those of one trainer rank in
    the order in which it sends them.
    """

    first_name: str
    units: dict[int, list[PlannedUnit]]
    absent: list[PlannedUnit]
    messages: list[PlannedMessage]


@dataclass(frozen=True)
class ExcerptPlan:
    """Everything about the updates of one `PlanExcerpts` that does not change between them."""

    command: PlanExcerpts
    needs: RankExcerpts
    stages: list[PlannedStage]
    dtypes: list[torch.dtype]

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
    dtypes = [torch_dtype(piece.dtype, piece.name) for piece in command.tensors]
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
                    _message(sender, message, dtypes)
                    for sender, stage in enumerate(same)
                    for message in stage.messages
                ],
            )
        )
    return ExcerptPlan(command, needs, stages, dtypes)


def _message(source: int, message: Message, dtypes: Sequence[torch.dtype]) -> PlannedMessage:
    found = {dtypes[part.tensor] for part in message.parts}
    dtype = found.pop() if len(found) == 1 else None
    item = 1 if dtype is None else dtype.itemsize
    spans = ((part.offset, (part.stop - part.start) * item) for part in message.parts)
    sizes, picks = ([], []) if dtype is None else cuts_of(spans, item)
    return PlannedMessage(source, message.num_bytes, message.parts, dtype, sizes, picks)


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
        size = math.prod(shape)
        unit = PlannedUnit(name, dtype, shape, size, excerpt is not None, origin, True)
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
            replace(unit, alone=False) if times[catalog.canonical(unit.name)] > 1 else unit
            for unit in some
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
