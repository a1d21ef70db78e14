"""The weights that an engine starts with: complete, and fit to be served."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from engine.errors import CheckpointError, ManifestMismatch
from engine.numerics import dtype_name
from engine.weights import finite
from engine.weights.catalog import Catalog
from engine.weights.load import load


def load_initial(
    catalog: Catalog,
    source: Iterable[tuple[str, torch.Tensor]],
    origin: Callable[[str], object] = lambda _name: "no file",
) -> None:
    """Fill a fresh model. origin: the file that holds a tensor, for errors.

    Raises ManifestMismatch for a tensor that is missing or does not belong to the model,
    CheckpointError for one that is not finite; both name the tensor and its file.
    """
    try:
        load(catalog, source)
    except ManifestMismatch as error:
        raise ManifestMismatch(
            f"{error.message} ({origin(error.field)})", field=error.field
        ) from error
    views = ((name, catalog.view(name)) for name in catalog.names)
    unfit = finite.find_unfit([(name, view, view.dtype) for name, view in views])
    if unfit is not None:
        name, why = unfit
        dtype = dtype_name(catalog.dtype(name))
        raise CheckpointError(
            f"{name} ({origin(name)}) {why} in {dtype}: the checkpoint is broken, or its "
            "values are beyond what this dtype holds",
            field=name,
        )
