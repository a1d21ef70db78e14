"""What an open update has received so far.

shadow: complete tensors wait here for the commit. in_place: a complete tensor is written into
the live weights as it arrives, and only its name and checksum are kept; undo: with a copy of
what it replaced. Tensors lent by a trainer cost no memory and wait for the commit in any mode.
Whatever is looked up for each tensor is a set or a dict: a model may have tens of thousands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from engine.errors import ManifestMismatch
from engine.protocol import BeginUpdate, TensorPiece, TensorSpec
from engine.weights.catalog import Catalog
from engine.weights.checksum import Checksums
from engine.weights.coverage import Coverage
from engine.weights.digest import with_tensor
from engine.weights.undo import UndoCopy


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
    staged: dict[str, torch.Tensor] = field(default_factory=dict)
    placed: dict[str, str] = field(default_factory=dict)
    """In-place mode: names by canonical name."""
    placed_bytes: int = 0
    touched: set[str] = field(default_factory=set)
    """Canonical names of live tensors that were written, or were about to be."""
    verified: bool = False
    """Whether what came was verified, and nothing came since."""
    peaks: dict[str, float] = field(default_factory=dict)
    """Largest magnitudes of staged tensors that were read for it already."""
    names: set[str] = field(default_factory=set)
    """Tensors that came completely."""
    lent: set[str] = field(default_factory=set)
    """Those of them that lie in memory of the trainer, which may change it."""
    digest: int = 0
    """Of the names, shapes and dtypes of the tensors that came completely."""
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

    def check(self, piece: TensorPiece) -> None:
        """Raise ManifestMismatch for a piece that was not announced like this or came before."""
        name = piece.name
        if name in self.names:
            raise ManifestMismatch(f"{name} came twice", field=name)
        spec = self.announced.get(name)
        if self.announced and spec is None:
            raise ManifestMismatch(f"{name} was not announced in the manifest", field=name)
        if spec is not None and (spec.dtype != piece.dtype or list(spec.shape) != piece.shape):
            raise ManifestMismatch(
                f"{name} came as {piece.dtype} {piece.shape}, announced was "
                f"{spec.dtype} {list(spec.shape)}",
                field=name,
            )
        if name in self._parts:
            self._parts[name].coverage.check(*bounds(piece))

    def add(
        self, piece: TensorPiece, flat: torch.Tensor, catalog: Catalog, *, lasting: bool
    ) -> None:
        """Take in a piece that passed `check`.

        flat: its elements [stop - start]. lasting: that memory stays as it is until the commit;
        else it is read before this returns, in the order of the current stream.
        """
        self.verified = False
        start, stop = bounds(piece)
        size = math.prod(piece.shape)
        if stop - start == size and piece.name not in self._parts:
            self.take(piece.name, flat.view(piece.shape), catalog, lasting=lasting)
            return
        part = self._part_of(piece, flat, size)
        part.elements[start:stop].copy_(flat, non_blocking=True)
        part.coverage.add(start, stop)
        if part.coverage.complete:
            self.take(piece.name, part.elements.view(piece.shape), catalog, lasting=True)
            del self._parts[piece.name]

    def take(self, name: str, tensor: torch.Tensor, catalog: Catalog, *, lasting: bool) -> None:
        """Take in a whole tensor: hold it, or a copy of it unless it is `lasting`, or write it
        in place."""
        self.verified = False
        if self.in_place:
            self._write(name, tensor, catalog)
        else:
            self.staged[name] = tensor if lasting else copy_of(tensor, catalog.device)
        self._came(name, tensor)

    def lend(self, name: str, tensor: torch.Tensor) -> None:
        """Take in a whole tensor that stays as it is until the commit, without reading it."""
        self.verified = False
        self.staged[name] = tensor
        self.lent.add(name)
        self._came(name, tensor)

    def keep_staged(self, catalog: Catalog) -> None:
        """Undo mode: copy what the commit will replace. Raises OutOfMemory."""
        self._keep([catalog.canonical(name) for name in self.staged], catalog)

    def touch(self, canonical: Iterable[str], catalog: Catalog) -> None:
        """Live tensors are about to be written: undo mode keeps each of them first."""
        fresh = [n for n in canonical if n not in self.touched and catalog.held_bytes(n)]
        self._keep(fresh, catalog)
        self.touched.update(fresh)

    def _touch_one(self, name: str, catalog: Catalog) -> None:
        """`touch` without the lists of a batch: tensors that come one by one are thousands."""
        if name in self.touched or not catalog.held_bytes(name):
            return
        if self.undo is not None:
            self.undo.keep_one(name, catalog.view(name))
        self.touched.add(name)

    def _came(self, name: str, tensor: torch.Tensor) -> None:
        self.names.add(name)
        self.digest = with_tensor(self.digest, name, tensor.dtype, tensor.shape)

    def _part_of(self, piece: TensorPiece, flat: torch.Tensor, size: int) -> _Part:
        if piece.name not in self._parts:
            elements = torch.empty(size, dtype=flat.dtype, device=flat.device)
            self._parts[piece.name] = _Part(elements, Coverage(piece.name, size))
        return self._parts[piece.name]

    def _write(self, name: str, tensor: torch.Tensor, catalog: Catalog) -> None:
        spec = self.announced.get(name)
        if spec is not None and spec.checksum is not None:
            self.sums.add(name, tensor)
        canonical = catalog.canonical(name)
        twin = self.placed.get(canonical)
        if twin is None:
            self._touch_one(canonical, catalog)
            self.placed_bytes += catalog.place_one(name, tensor)
            self.placed[canonical] = name
            return
        if not catalog.holds(name, tensor):
            raise tied_differ(name, twin)

    def _keep(self, canonical: Iterable[str], catalog: Catalog) -> None:
        if self.undo is not None:
            self.undo.keep(
                {
                    name: catalog.view(name)
                    for name in self.undo.without(canonical)
                    if catalog.held_bytes(name)
                }
            )


def copy_of(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The elements of a tensor in contiguous memory of their own, read when this returns: in
    the order of the current stream of the device they come from."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return copy.copy_(tensor)


def bounds(piece: TensorPiece) -> tuple[int, int]:
    """[start, stop) of a piece's elements in the flattened tensor."""
    return piece.start, math.prod(piece.shape) if piece.stop < 0 else piece.stop


def tied_differ(name: str, twin: str) -> ManifestMismatch:
    """The error of two names of one tensor that came with different values."""
    return ManifestMismatch(f"{name} differs from {twin}: this model ties the two", field=name)
