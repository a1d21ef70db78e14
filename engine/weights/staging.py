"""What an open update has received so far.

shadow: complete tensors wait here for the commit. in_place: a complete tensor is written into
the live weights as it arrives, and only its name and checksum are kept; undo: with a copy of
what it replaced. Tensors lent by a trainer cost no memory and wait for the commit in any mode.
Whatever is looked up for each tensor is a set or a dict: a model may have tens of thousands.
All of it is by unit, so that a fused tensor is its units from the moment it arrives (`units.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from engine.errors import ManifestMismatch
from engine.numerics import dtype_name
from engine.protocol import BeginUpdate, TensorPiece, TensorSpec
from engine.weights.catalog import Catalog
from engine.weights.checksum import Checksums
from engine.weights.coverage import Coverage
from engine.weights.undo import UndoCopy
from engine.weights.units import Origin, bounds, cuts, whole_units

Arrived = tuple[TensorPiece, torch.Tensor]
"""A piece and its elements, flat [stop - start]."""

_BATCH_BYTES = 16 << 20
_BATCH_TENSORS = 256
"""So few objects at a time never set off a full collection of garbage."""


@dataclass
class _Part:
    """A tensor of which some elements came."""

    elements: torch.Tensor
    coverage: Coverage


@dataclass
class OpenUpdate:
    """An update between begin and commit. Times of time.monotonic."""

    begin: BeginUpdate
    announced: dict[str, TensorSpec]
    in_place: bool
    undo: UndoCopy | None
    started: float
    expires: float
    names: dict[str, torch.dtype] = field(default_factory=dict)
    """Units that came completely, and the dtypes they came in."""
    staged: dict[str, torch.Tensor] = field(default_factory=dict)
    excerpts: set[str] = field(default_factory=set)
    """Units of which only what this rank reads came."""
    placed: dict[str, str] = field(default_factory=dict)
    """In-place mode: names by canonical name."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Of units that came fused, the tensors they came in."""
    placed_bytes: int = 0
    lent: set[str] = field(default_factory=set)
    """Those that lie in memory of the trainer, which may change it."""
    digest: int | None = None
    """Of all that came, once it was verified and nothing came since."""
    peaks: dict[str, float] = field(default_factory=dict)
    """Largest magnitudes of staged tensors that were read for it already."""
    sums: Checksums = field(default_factory=Checksums)
    _parts: dict[str, _Part] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The version this update leads to."""
        return self.begin.version

    @property
    def is_empty(self) -> bool:
        """Whether nothing came yet."""
        return not (self.staged or self.placed or self._parts)

    def unfinished(self) -> tuple[str, tuple[int, int]] | None:
        """A tensor of which some elements came, and the first range that did not."""
        for name, part in self._parts.items():
            missing = part.coverage.missing
            assert missing is not None, "complete tensors are no parts"
            return name, missing
        return None

    def awaits(self, piece: TensorPiece) -> bool:
        """Whether a tensor of this name, dtype and shape was announced."""
        spec = self.announced.get(piece.name)
        return spec is not None and spec.dtype == piece.dtype and list(spec.shape) == piece.shape

    def sum_of(self, unit: str) -> tuple[TensorSpec | None, int]:
        """The announcement of a unit, or of what it came in, if that has a checksum; and where in
        it the unit begins."""
        origin = self.origins.get(unit)
        name, start = (unit, 0) if origin is None else (origin.name, origin.start)
        spec = self.announced.get(name)
        return (None if spec is None or spec.checksum is None else spec), start

    def is_summed(self, unit: str) -> bool:
        """Whether a unit, or what it came in, was read for its checksum."""
        origin = self.origins.get(unit)
        return (unit if origin is None else origin.name) in self.sums

    def check(self, piece: TensorPiece, catalog: Catalog) -> None:
        """Raise ManifestMismatch for a piece that was not announced like this or came before."""
        name = piece.name
        if name in self.names:
            raise _came_twice(name)
        if self.announced and not self.awaits(piece):
            raise _unlike(piece, self.announced.get(name))
        if not catalog.is_fused(name):
            self._check_unit(piece)
            return
        Coverage(name, math.prod(piece.shape)).check(*bounds(piece))
        for cut in cuts(piece, catalog):
            if cut.piece.name in self.names:
                raise _came_twice(cut.piece.name)
            self._check_unit(cut.piece)

    def _check_unit(self, piece: TensorPiece) -> None:
        part = self._parts.get(piece.name)
        if part is not None:
            require_alike(piece, dtype_name(part.elements.dtype))
            part.coverage.check(*bounds(piece))

    def add(self, batch: Sequence[Arrived], catalog: Catalog, *, lasting: bool) -> None:
        """Take in pieces. Their memory stays as it is until this returns, and until the commit
        if it is `lasting`; else it is read in the order of the current stream.

        Raises ManifestMismatch for a piece that may not come.
        """
        self.digest = None
        whole: dict[str, torch.Tensor] = {}
        for piece, flat in batch:
            self.check(piece, catalog)
            if not catalog.is_fused(piece.name):
                self._add_unit(piece, flat, whole, catalog)
                continue
            for cut in cuts(piece, catalog):
                self.origins[cut.piece.name] = cut.origin
                size = cut.piece.stop - cut.piece.start
                self._add_unit(cut.piece, flat[cut.offset : cut.offset + size], whole, catalog)
        self._take(whole, catalog, lasting=lasting)

    def take(self, name: str, tensor: torch.Tensor, catalog: Catalog) -> None:
        """Take in a whole tensor: hold a copy of it, or write it in place."""
        self._take(self._units(name, tensor, catalog), catalog, lasting=False)

    def lend(self, name: str, tensor: torch.Tensor, catalog: Catalog) -> None:
        """Take in a whole tensor that stays as it is until the commit, without reading it."""
        self.digest = None
        for unit, values in self._units(name, tensor, catalog).items():
            self.staged[unit] = values
            self.lent.add(unit)
            self.names[unit] = values.dtype

    def take_units(
        self,
        held: Mapping[str, torch.Tensor],
        live: Mapping[str, torch.Tensor],
        excerpts: Iterable[str],
        catalog: Catalog,
    ) -> None:
        """Take in units that came complete: in memory that lasts, or in the `live` weights
        themselves, of which `keep` was told before. excerpts: those of which only what this rank
        reads came."""
        self.excerpts.update(excerpts)
        self._take(held, catalog, lasting=True)
        for name, tensor in live.items():
            self.names[name] = tensor.dtype
            self.placed[catalog.canonical(name)] = name
            self.placed_bytes += catalog.held_bytes(name)

    def keep(self, names: Iterable[str], catalog: Catalog) -> None:
        """Undo mode: copy what is live of tensors, by any of their names, that are to be
        written. Raises OutOfMemory."""
        if self.undo is not None:
            self.undo.keep(catalog.written(names), catalog)

    def _units(
        self, name: str, tensor: torch.Tensor, catalog: Catalog
    ) -> Mapping[str, torch.Tensor]:
        """A whole tensor as the units that it is."""
        if not catalog.is_fused(name):
            return {name: tensor}
        units: dict[str, torch.Tensor] = {}
        for unit, values, origin in whole_units(name, tensor, catalog):
            units[unit], self.origins[unit] = values, origin
        return units

    def _take(
        self, tensors: Mapping[str, torch.Tensor], catalog: Catalog, *, lasting: bool
    ) -> None:
        """Take in whole units: hold each, or a copy of it unless it is `lasting`, or write them
        in place."""
        self.digest = None
        if self.in_place:
            self._write(self._with_halves(tensors, catalog), catalog)
        elif lasting:
            self.staged.update(tensors)
        else:
            self.staged.update({n: copy_of(t, catalog.device) for n, t in tensors.items()})
        self.names.update({name: tensor.dtype for name, tensor in tensors.items()})

    def _with_halves(
        self, tensors: Mapping[str, torch.Tensor], catalog: Catalog
    ) -> Mapping[str, torch.Tensor]:
        """What can be written: an encoded tensor and its scales once both came. A half waits in
        `staged`, whatever the mode."""
        if not catalog.has_scales:
            return tensors
        ready: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            other = catalog.other_half(name, tensor.dtype)
            half = tensors.get(other) if other else None
            if other and half is None:
                half = self.staged.pop(other, None)
            if other and half is None:
                self.staged[name] = copy_of(tensor, catalog.device)
                continue
            ready[name] = tensor
            if half is not None:
                ready[other] = half
        return ready

    def _add_unit(
        self,
        piece: TensorPiece,
        flat: torch.Tensor,
        whole: dict[str, torch.Tensor],
        catalog: Catalog,
    ) -> None:
        """Note a piece of a unit among the `whole` ones of its batch, or among the parts."""
        if piece.name in whole:
            raise _came_twice(piece.name)
        if is_whole(piece) and piece.name not in self._parts:
            whole[piece.name] = flat.view(piece.shape)
        else:
            self._add_part(piece, flat, catalog)

    def _add_part(self, piece: TensorPiece, flat: torch.Tensor, catalog: Catalog) -> None:
        part = self._parts.get(piece.name)
        if part is None:
            size = math.prod(piece.shape)
            elements = torch.empty(size, dtype=flat.dtype, device=flat.device)
            part = self._parts[piece.name] = _Part(elements, Coverage(piece.name, size))
        start, stop = bounds(piece)
        part.elements[start:stop].copy_(flat, non_blocking=True)
        part.coverage.add(start, stop)
        if part.coverage.complete:
            self._take({piece.name: part.elements.view(piece.shape)}, catalog, lasting=True)
            del self._parts[piece.name]

    def _write(self, tensors: Mapping[str, torch.Tensor], catalog: Catalog) -> None:
        fresh: dict[str, str] = {}
        twins: dict[str, str] = {}
        scales: list[str] = []
        for name, tensor in tensors.items():
            spec, start = self.sum_of(name)
            if spec is not None:
                self.sums.add(spec.name, tensor, start)
            canonical = catalog.canonical(name)
            if catalog.are_scales(name):
                scales.append(name)
            elif canonical in self.placed or canonical in fresh:
                twins[name] = canonical
            else:
                fresh[canonical] = name
        self.keep(fresh, catalog)
        written = {name: tensors[name] for name in (*fresh.values(), *scales)}
        self.placed_bytes += catalog.place(written, self.excerpts)
        self.placed.update(fresh)
        for name, canonical in twins.items():
            if not catalog.holds(name, tensors[name], is_excerpt=name in self.excerpts):
                raise tied_differ(name, self.placed[canonical])


def batches(pieces: Iterable[Arrived]) -> Iterator[list[Arrived]]:
    """Pieces to take in together: few enough that it does not matter if each is a copy that was
    made for it. No reference to them is kept while the next ones are made."""
    batch: list[Arrived] = []
    num_bytes = 0
    for arrived in pieces:
        batch.append(arrived)
        num_bytes += arrived[1].nbytes
        del arrived
        if num_bytes >= _BATCH_BYTES or len(batch) == _BATCH_TENSORS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def copy_of(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The elements of a tensor in contiguous memory of their own, read when this returns: in
    the order of the current stream of the device they come from."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return copy.copy_(tensor)


def is_whole(piece: TensorPiece) -> bool:
    """Whether a piece is all of its tensor."""
    return piece.start == 0 and (piece.stop < 0 or piece.stop == math.prod(piece.shape))


def require_alike(piece: TensorPiece, dtype: str) -> None:
    """Raise ManifestMismatch unless a piece has the dtype of those of its tensor before it."""
    if piece.dtype != dtype:
        raise ManifestMismatch(
            f"{piece.name} comes in pieces of {dtype} and of {piece.dtype}; send all of a tensor "
            "in one dtype",
            field=piece.name,
        )


def _came_twice(name: str) -> ManifestMismatch:
    return ManifestMismatch(f"{name} came twice", field=name)


def _unlike(piece: TensorPiece, spec: TensorSpec | None) -> ManifestMismatch:
    name = piece.name
    if spec is None:
        return ManifestMismatch(f"{name} was not announced in the manifest", field=name)
    return ManifestMismatch(
        f"{name} came as {piece.dtype} {piece.shape}, announced was {spec.dtype} "
        f"{list(spec.shape)}",
        field=name,
    )


def tied_differ(name: str, twin: str) -> ManifestMismatch:
    """The error of two names of one tensor that came with different values."""
    return ManifestMismatch(f"{name} differs from {twin}: this model ties the two", field=name)
