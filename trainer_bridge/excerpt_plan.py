"""What one trainer rank sends to every engine rank, planned once for many updates."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ManifestMismatch
from engine.protocol import (
    ITEM_BYTES,
    BeginUpdate,
    Block,
    Message,
    Part,
    PlanExcerpts,
    RankExcerpts,
    Rectangle,
    TensorPiece,
    pair_stages,
    rectangles,
)
from engine.protocol.updates import DIRECT_BYTES

_ALIGNMENT = 256


@dataclass(frozen=True)
class Source:
    """Where a part lies: rectangles of share number `share`, its elements counted from its start;
    `offset` and `num_bytes` of it in its message. run: its [first, last) elements of the share, if
    they are one run."""

    share: int
    rectangles: tuple[Rectangle, ...]
    run: tuple[int, int] | None
    offset: int
    num_bytes: int


def _run(found: tuple[Rectangle, ...]) -> tuple[int, int] | None:
    if len(found) > 1:
        return None
    ((start, sizes, strides),) = found
    size = 1
    for length, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if stride != size and length > 1:
            return None
        size *= length
    return start, start + size


@dataclass(frozen=True)
class Planned:
    """One message to engine rank `rank`. run: the elements that it is, where they lie in one run
    of one share. offset: of its place among the packed bytes of its stage."""

    rank: int
    num_bytes: int
    sources: tuple[Source, ...]
    run: tuple[int, int] | None
    offset: int


@dataclass(frozen=True)
class SendStage:
    """Messages that go at once. shares: numbers of those that they are of, in order.
    packed_bytes: of memory in which all of them have a place."""

    first_name: str
    shares: tuple[int, ...]
    messages: tuple[Planned, ...]
    packed_bytes: int


def plan_command(
    group: str,
    begin: BeginUpdate,
    pieces: Sequence[Sequence[TensorPiece]],
    *,
    bucket_bytes: int,
    timeout_s: float,
    direct_bytes: int = DIRECT_BYTES,
) -> PlanExcerpts:
    """What every engine is told of the updates to come. pieces: of each trainer rank.

    Raises ManifestMismatch for a piece of a tensor that is not announced, or unlike it.
    """
    numbers = {spec.name: number for number, spec in enumerate(begin.manifest)}
    shares = []
    for own in pieces:
        shares.append([_share(piece, numbers, begin) for piece in own])
    return PlanExcerpts(
        group=group,
        tensors=[TensorPiece(spec.name, spec.dtype, spec.shape) for spec in begin.manifest],
        shares=shares,
        bucket_bytes=bucket_bytes,
        direct_bytes=direct_bytes,
        whole=needs_whole(begin),
        timeout_s=timeout_s,
    )


def needs_whole(begin: BeginUpdate) -> bool:
    """Whether every rank has to see all of every tensor, for its checksum."""
    return any(spec.checksum is not None for spec in begin.manifest)


def _share(piece: TensorPiece, numbers: dict[str, int], begin: BeginUpdate) -> tuple[int, int, int]:
    number = numbers.get(piece.name)
    if number is None:
        raise ManifestMismatch(f"{piece.name} was not announced in the manifest", field=piece.name)
    spec = begin.manifest[number]
    if (spec.dtype, list(spec.shape)) != (piece.dtype, list(piece.shape)):
        raise ManifestMismatch(
            f"{piece.name} is sent as {piece.dtype} {list(piece.shape)}, announced was "
            f"{spec.dtype} {list(spec.shape)}",
            field=piece.name,
        )
    return number, piece.start, math.prod(piece.shape) if piece.stop < 0 else piece.stop


def plan_sends(
    command: PlanExcerpts, sender: int, needs: Sequence[RankExcerpts]
) -> list[SendStage]:
    """The stages of trainer rank `sender`. needs: of every engine rank, by its place among those
    of all engines; messages are for ranks of the group, in which the trainer's come first."""
    shares = _Shares(command, sender)
    pairs = [pair_stages(command, sender, excerpts) for excerpts in needs]
    found = []
    for same in zip(*pairs, strict=True):
        first, last = same[0].first, same[0].last
        messages: list[Planned] = []
        end = 0
        for place, stage in enumerate(same):
            for message in stage.messages:
                sources = tuple(
                    shares.source(part, needs[place].tensors[part.tensor][part.block])
                    for part in message.parts
                )
                messages.append(_planned(place + len(command.shares), message, sources, end))
                end = -(-(end + message.num_bytes) // _ALIGNMENT) * _ALIGNMENT
        found.append(
            SendStage(
                first_name=command.tensors[first].name,
                shares=shares.within(first, last),
                messages=tuple(messages),
                packed_bytes=end,
            )
        )
    return found


def _planned(rank: int, message: Message, sources: tuple[Source, ...], offset: int) -> Planned:
    run = sources[0].run if len(sources) == 1 else None
    return Planned(rank, message.num_bytes, sources, run, offset)


class _Shares:
    """One trainer rank's shares, looked up by the tensor and the element that they hold."""

    def __init__(self, command: PlanExcerpts, sender: int) -> None:
        self._command = command
        self._shares = command.shares[sender]
        order = sorted(range(len(self._shares)), key=lambda at: self._shares[at])
        self._order = order
        self._keys = [self._shares[at][:2] for at in order]

    def within(self, first: int, last: int) -> tuple[int, ...]:
        """Numbers of the shares of tensors [first, last), in the order in which they are sent."""
        low = bisect_right(self._keys, (first, -1))
        high = bisect_right(self._keys, (last, -1))
        return tuple(sorted(self._order[low:high]))

    def source(self, part: Part, block: Block) -> Source:
        """Where this rank has a part of a block."""
        found = list(rectangles(block, part.start, part.stop))
        at = self._order[bisect_right(self._keys, (part.tensor, found[0].start)) - 1]
        begin = self._shares[at][1]
        moved = tuple(Rectangle(start - begin, sizes, strides) for start, sizes, strides in found)
        item = ITEM_BYTES[self._command.tensors[part.tensor].dtype]
        num_bytes = (part.stop - part.start) * item
        return Source(at, moved, _run(moved), part.offset, num_bytes)
