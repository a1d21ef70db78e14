"""Named tensors into a model that serves nobody yet, every name exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engine.errors import ManifestMismatch
from engine.protocol import BeginUpdate
from engine.weights import verify
from engine.weights.catalog import Catalog
from engine.weights.expected import Expected
from engine.weights.staging import OpenUpdate
from engine.weights.torn import and_more


@dataclass(frozen=True)
class LoadReport:
    """What was placed: tensors, and bytes written on this rank."""

    num_tensors: int
    num_bytes: int


def load(
    catalog: Catalog, source: Iterable[tuple[str, torch.Tensor]], *, partial: bool = False
) -> LoadReport:
    """Place every tensor of `source` into the model of `catalog`, in place: an update without a
    manifest whose tensors are written as they come.

    source: (Hugging Face name, full tensor) pairs, any order, dtype and device. A tied tensor may
    come under either of its names or both; the values must then be equal.
    partial: tensors that do not come keep their values.
    Raises ManifestMismatch naming the tensor: unknown, duplicate, missing, or misshapen.
    """
    begin = BeginUpdate(version=0, partial=partial)
    update = OpenUpdate(begin, {}, in_place=True, undo=None, started=0.0, expires=math.inf)
    expected = Expected(catalog)
    for name, tensor in source:
        expected.check_whole(update, name, tensor)
        tensor = tensor.detach()
        update.take(name, tensor, catalog)
        # Not held while the source makes the next: it may be as large.
        del tensor
    verify.require_halves(update.names, catalog)
    missing = [] if partial else catalog.missing(update.names)
    if missing:
        raise ManifestMismatch(f"{and_more(missing)} did not come", field=missing[0])
    return LoadReport(len(catalog.covered(update.names)), update.placed_bytes)
