"""The weights that an engine starts with: complete, and fit to be served."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

import torch

from engine.errors import CheckpointError, ManifestMismatch
from engine.numerics import dtype_name
from engine.weights import finite
from engine.weights.catalog import Catalog
from engine.weights.load import load

logger = logging.getLogger(__name__)

Peak = tuple[float, torch.dtype]
"""Largest magnitude of a tensor, and the dtype it came in."""


def load_initial(
    catalog: Catalog,
    source: Iterable[tuple[str, torch.Tensor]],
    origin: Callable[[str], object] = lambda _name: "no file",
) -> None:
    """Fill a fresh model. origin: the file that holds a tensor, for errors.

    Raises ManifestMismatch for a tensor that is missing or does not belong to the model,
    CheckpointError for one that is not finite, or has values beyond those of the dtype it is
    served in; both name the tensor and its file. A tensor whose largest value is below the normal
    numbers of that dtype is logged: little or nothing is left of it.
    """
    came: dict[str, Peak] = {}
    try:
        load(catalog, _noting_peaks(source, catalog, came))
    except ManifestMismatch as error:
        raise ManifestMismatch(
            f"{error.message} ({origin(error.field)})", field=error.field
        ) from error
    known = [(name, *peak, catalog.dtype(name)) for name, peak in came.items()]
    stored = [(name, view, view.dtype) for name in catalog.names for view in catalog.floats(name)]
    unfit = finite.first_unfit(known) or finite.find_unfit(stored)
    if unfit is not None:
        name, why = unfit
        dtype = dtype_name(catalog.dtype(name))
        raise CheckpointError(
            f"{name} ({origin(name)}) {why}; it is to be served in {dtype}: the checkpoint is "
            "broken, or wants a dtype of wider range",
            field=name,
        )
    _tell_faint(came, catalog)


def _tell_faint(came: dict[str, Peak], catalog: Catalog) -> None:
    for name, (peak, _) in came.items():
        dtype = catalog.dtype(name)
        least = torch.finfo(dtype).smallest_normal
        if 0 < peak < least:
            told = "%s has no value above %g: %s rounds coarsely below %g, and to zero at last"
            logger.warning(told, name, peak, dtype_name(dtype), least)


def _noting_peaks(
    source: Iterable[tuple[str, torch.Tensor]], catalog: Catalog, came: dict[str, Peak]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `source`; those that will be converted to a dtype of fewer exponents are read
    first, since afterwards what was too large is inf and what was too small is zero."""
    for name, tensor in source:
        if _narrows(catalog, name, tensor):
            came[name] = (finite.find_peaks([tensor])[0], tensor.dtype)
        yield name, tensor
        # Not held while the source makes the next: it may be as large.
        del tensor


def _narrows(catalog: Catalog, name: str, tensor: torch.Tensor) -> bool:
    if not (catalog.has(name) and tensor.is_floating_point()):
        return False
    served, own = torch.finfo(catalog.dtype(name)), torch.finfo(tensor.dtype)
    return served.smallest_normal > own.smallest_normal
