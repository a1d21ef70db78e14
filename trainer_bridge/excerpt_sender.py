"""The sending end of a transfer in which every engine rank gets only what it reads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from engine.errors import ManifestMismatch, SlipstreamError, UpdateTimeout
from engine.protocol import BUCKET_ALIGNMENT, TensorPiece, cuts_of
from kernels.torch_compat import copy_together
from trainer_bridge.adapters.base import dtype_name
from trainer_bridge.excerpt_plan import Planned, SendStage, Source
from trainer_bridge.process_group import SenderGroup

Shard = tuple[TensorPiece, torch.Tensor]

_IN_FLIGHT = 2
_CHECK_S = 0.25
_SMALL_BYTES = 1 << 20


class ExcerptSender:
    """Sends what engine ranks take of one trainer rank's shards, stage by stage.

    What lies in one run is sent from where it is, anything else is packed first, on a GPU on a
    stream of its own while the stage before travels. The buffers are kept between updates.
    """

    def __init__(self, group: SenderGroup, device: torch.device) -> None:
        self.group = group
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def send(
        self,
        stages: Sequence[SendStage],
        pieces: Sequence[TensorPiece],
        shards: Iterator[Shard],
        *,
        deadline: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Send every stage by `deadline`. shards: yields `pieces` in their order; each keeps its
        values until this returns. check: called now and then; raises when the receivers have
        given up. Whatever is raised, also by `shards`, has torn the group down.
        """
        sent = False
        try:
            held = _Held(pieces, shards)
            with self._on_device():
                self._send_stages(stages, held, deadline, check)
            held.finish()
            sent = True
        finally:
            if not sent:
                self.group.abort()

    def _send_stages(
        self,
        stages: Sequence[SendStage],
        held: _Held,
        deadline: float,
        check: Callable[[], None],
    ) -> None:
        seldom = _seldom(check)
        self.group.send([], seldom)
        in_flight: deque[tuple[SendStage, Any, Any]] = deque()
        num_sent = 0
        for stage in stages:
            flats = held.take(stage)
            if not stage.messages:
                continue
            if len(in_flight) == _IN_FLIGHT:
                self._wait(*in_flight.popleft()[:2], deadline, check)
            seldom()
            messages = self._messages(stage, flats, num_sent)
            # The flats stay as long as they may be read.
            in_flight.append((stage, self.group.send(messages, seldom), flats))
            num_sent += 1
        while in_flight:
            self._wait(*in_flight.popleft()[:2], deadline, check)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _wait(
        self, stage: SendStage, work: Any, deadline: float, check: Callable[[], None]
    ) -> None:
        try:
            self.group.wait(work, deadline, _seldom(check))
        except UpdateTimeout as error:
            check()
            name = stage.first_name
            raise UpdateTimeout(f"{error.message}, from {name} on", field=name) from error
        except SlipstreamError:
            # A receiver that refused says more than the connection that it left.
            check()
            raise

    def _messages(
        self, stage: SendStage, flats: dict[int, torch.Tensor], number: int
    ) -> list[tuple[torch.Tensor, int]]:
        found: list[tuple[torch.Tensor, int]] = []
        packed: list[tuple[Planned, torch.Tensor]] = []
        for message in stage.messages:
            data = self._resident(message, flats)
            if data is None:
                buffer = self._buffer(number, stage.packed_bytes)
                data = buffer[message.offset : message.offset + message.num_bytes]
                packed.append((message, data))
            found.append((data, message.rank))
        self._pack(packed, flats)
        return found

    def _resident(self, message: Planned, flats: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """The bytes of a message where they are, if they can be sent from there."""
        if message.run is None:
            return None
        flat = flats[message.sources[0].share]
        data = flat[message.run[0] : message.run[1]]
        if flat.device != self._device or data.data_ptr() % BUCKET_ALIGNMENT:
            return None
        return data.view(torch.uint8)

    def _buffer(self, number: int, num_bytes: int) -> torch.Tensor:
        """One of as many buffers as there are stages in flight: the one whose reader is done."""
        while len(self._buffers) < _IN_FLIGHT:
            self._buffers.append(torch.empty(0, dtype=torch.uint8, device=self._device))
        at = number % _IN_FLIGHT
        if self._buffers[at].numel() < num_bytes:
            self._buffers[at] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return self._buffers[at]

    def _pack(
        self, packed: Sequence[tuple[Planned, torch.Tensor]], flats: dict[int, torch.Tensor]
    ) -> None:
        if self._device.type != "cuda":
            _copy(packed, flats)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            _copy(packed, flats)
        current.wait_stream(self._stream)


def _copy(packed: Sequence[tuple[Planned, torch.Tensor]], flats: dict[int, torch.Tensor]) -> None:
    """Copy the elements of each message into its bytes, small runs together."""
    small: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for message, data in packed:
        for source, target in _targets(message, data, flats):
            for part, values in _parts(source, flats[source.share], target):
                if values.nbytes >= _SMALL_BYTES or values.device != part.device:
                    part.copy_(values, non_blocking=True)
                    continue
                targets, sources = small.setdefault(values.dtype, ([], []))
                targets.append(part)
                sources.append(values)
    for targets, sources in small.values():
        copy_together(targets, sources)


def _targets(
    message: Planned, data: torch.Tensor, flats: dict[int, torch.Tensor]
) -> Iterator[tuple[Source, torch.Tensor]]:
    """The parts of a message, and where each goes: in one call where all have one dtype."""
    dtypes = {flats[source.share].dtype for source in message.sources}
    if len(dtypes) == 1:
        (dtype,) = dtypes
        spans = ((source.offset, source.num_bytes) for source in message.sources)
        sizes, picks = cuts_of(spans, dtype.itemsize)
        runs = data.view(dtype).split_with_sizes(sizes)
        yield from zip(message.sources, (runs[pick] for pick in picks), strict=True)
        return
    for source in message.sources:
        target = data[source.offset : source.offset + source.num_bytes]
        yield source, target.view(flats[source.share].dtype)


def _parts(
    source: Source, flat: torch.Tensor, target: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Where each rectangle goes, and its values: of one shape."""
    if source.run is not None:
        first, last = source.run
        yield target, flat if last - first == flat.numel() else flat[first:last]
        return
    begin = 0
    for start, sizes, strides in source.rectangles:
        values = flat.as_strided(sizes, strides, flat.storage_offset() + start)
        yield target[begin : begin + values.numel()].view(sizes), values
        begin += values.numel()


class _Held:
    """Shards that were yielded and are still to be sent. Few: a stage's come together."""

    def __init__(self, pieces: Sequence[TensorPiece], shards: Iterator[Shard]) -> None:
        self._pieces = pieces
        self._shards = shards
        self._next = 0
        self._early: dict[int, torch.Tensor] = {}

    def take(self, stage: SendStage) -> dict[int, torch.Tensor]:
        """The elements of the shares of a stage, by number. Raises ManifestMismatch where the
        source yields something else than when it was planned."""
        while self._next <= max(stage.shares, default=-1):
            self._pull()
        return {number: self._early.pop(number) for number in stage.shares}

    def finish(self) -> None:
        """Raise ManifestMismatch if the source has more than was planned."""
        more = next(self._shards, None)
        if more is not None:
            name = more[0].name
            raise ManifestMismatch(f"the source yields {name}, which was not planned", field=name)

    def _pull(self) -> None:
        planned = self._pieces[self._next]
        piece, flat = next(self._shards, (None, None))
        if piece is None or flat is None:
            raise ManifestMismatch(
                f"{planned.name} was planned and did not come", field=planned.name
            )
        if piece != planned or dtype_name(flat.dtype) != planned.dtype:
            raise ManifestMismatch(
                f"the source yields elements [{piece.start}, {piece.stop}) of {piece.name} as "
                f"{dtype_name(flat.dtype)} where it planned [{planned.start}, {planned.stop}) of "
                f"{planned.name} as {planned.dtype}",
                field=planned.name,
            )
        self._early[self._next] = flat.detach().reshape(-1).contiguous()
        self._next += 1


def _seldom(check: Callable[[], None]) -> Callable[[], None]:
    """`check`, which may ask another process, a few times a second at most."""
    last = [0.0]

    def sometimes() -> None:
        now = time.monotonic()
        if now - last[0] >= _CHECK_S:
            last[0] = now
            check()

    return sometimes
