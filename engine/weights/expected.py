"""Which tensors may come: manifests and lists of tensors, looked through before anything moves.

A trainer sends the same ones every time, and models have tens of thousands of tensors, so what
was found of the last list is kept: looked through once is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from engine.errors import SlipstreamError
from engine.numerics import dtype_name
from engine.protocol import BeginUpdate, TensorPiece, TensorSpec
from engine.weights import verify
from engine.weights.catalog import Catalog
from engine.weights.coverage import Coverage
from engine.weights.digest import digest_of
from engine.weights.layouts import torch_dtype
from engine.weights.staging import OpenUpdate, require_alike
from engine.weights.units import bounds, cuts


class Expected:
    """Looks through what `UpdateSession` is told will come; nothing is changed by it."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._announced: tuple[list[TensorSpec], bool, dict[str, TensorSpec]] | None = None
        self._pieces: tuple[dict[str, TensorSpec], Sequence[TensorPiece]] | None = None
        self._digest: tuple[Sequence[TensorPiece], int] | None = None

    def announced(self, command: BeginUpdate) -> dict[str, TensorSpec]:
        """The manifest of `command` by name. Raises ManifestMismatch if it is not of this model."""
        known = self._announced
        if known is None or known[:2] != (command.manifest, command.partial):
            announced = verify.announced_tensors(
                command.manifest, self._catalog, partial=command.partial
            )
            # Lists of their own: a trainer of this process may write its list anew.
            known = self._announced = ([*command.manifest], command.partial, announced)
        return known[2]

    def check_all(self, update: OpenUpdate, pieces: Sequence[TensorPiece]) -> None:
        """Raise ManifestMismatch unless all of `pieces` may come."""
        known = self._pieces if update.is_empty else None
        if known is not None and known[0] is update.announced and known[1] == pieces:
            return
        seen: dict[str, tuple[TensorPiece, Coverage]] = {}
        for piece in pieces:
            self.check(update, piece)
            if not self._catalog.is_fused(piece.name):
                _note(piece, seen)
                continue
            for cut in cuts(piece, self._catalog):
                _note(cut.piece, seen)
        if update.is_empty:
            self._pieces = (update.announced, [*pieces])

    def check(self, update: OpenUpdate, piece: TensorPiece) -> None:
        """Raise ManifestMismatch unless `piece` may come."""
        # What was announced was held against the model then.
        if not update.awaits(piece):
            self._catalog.check(piece.name, piece.shape)
            self._catalog.check_dtype(piece.name, torch_dtype(piece.dtype, piece.name))
        update.check(piece, self._catalog)

    def check_whole(self, update: OpenUpdate, name: str, tensor: torch.Tensor) -> None:
        """Raise ManifestMismatch unless `tensor` may come as the whole of `name`."""
        self._catalog.check_dtype(name, tensor.dtype)
        self.check(update, TensorPiece(name, dtype_name(tensor.dtype), list(tensor.shape)))

    def digest(self, pieces: Sequence[TensorPiece], refusal: SlipstreamError | None) -> int:
        """Of what this rank is to take in, by which ranks agree; 0 if it refuses."""
        if refusal is not None:
            return 0
        if self._digest is None or self._digest[0] != pieces:
            self._digest = ([*pieces], digest_of(pieces))
        return self._digest[1]


def _note(piece: TensorPiece, seen: dict[str, tuple[TensorPiece, Coverage]]) -> None:
    """Raise ManifestMismatch for a piece of a unit that is unlike those `seen`, or overlaps one."""
    fresh = (piece, Coverage(piece.name, math.prod(piece.shape)))
    first, coverage = seen.setdefault(piece.name, fresh)
    require_alike(piece, first.dtype)
    coverage.add(*bounds(piece))
