"""Whether an update is held in a shadow or written in place, with or without an undo copy."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from engine.errors import OutOfMemory
from engine.protocol import ITEM_BYTES, BeginUpdate
from engine.weights.catalog import Catalog

logger = logging.getLogger(__name__)

REFUSED, IN_PLACE, UNDO, SHADOW = 0, 1, 2, 3
"""In this order, so that the least over ranks is what all of them can do."""

_MARGIN_BYTES = {"cuda": 512 << 20, "cpu": 16 << 20}
_WIDEST = 8


def choose_mode(
    command: BeginUpdate,
    catalog: Catalog,
    device: torch.device,
    free: Callable[[torch.device], int],
) -> int:
    """IN_PLACE, UNDO or SHADOW for an update of full tensors on `device`.

    free: bytes that can be allocated there. Raises OutOfMemory, with its arithmetic, for a
    shadow or an undo copy that was asked for and does not fit.
    """
    if command.mode == "in_place":
        return IN_PLACE
    usable = free(device) - _MARGIN_BYTES.get(device.type, 0)
    needed = [
        (SHADOW, "shadow", shadow_bytes(command, catalog)),
        (UNDO, "undo", undo_size(command, catalog)[0]),
    ]
    for mode, name, num_bytes in needed:
        if num_bytes <= usable and command.mode in ("auto", name):
            logger.debug("version %d: %s, %d bytes of %d", command.version, name, num_bytes, usable)
            return mode
    if command.mode != "auto":
        num_bytes = next(size for _, name, size in needed if name == command.mode)
        what = "a shadow" if command.mode == "shadow" else "an undo copy"
        raise OutOfMemory(
            f"{what} of {num_bytes / 2**30:.2f} GiB does not fit: {max(usable, 0) / 2**30:.2f} GiB "
            "can be used; begin with mode 'in_place', or give the KV pool less",
            field="mode",
        )
    logger.info("version %d is written in place: %d bytes usable", command.version, usable)
    return IN_PLACE


def shadow_bytes(command: BeginUpdate, catalog: Catalog) -> int:
    """Bytes of the full tensors that will come; without a manifest, those of the model."""
    if not command.manifest:
        return catalog.full_bytes()
    return sum(
        math.prod(spec.shape) * ITEM_BYTES.get(spec.dtype, _WIDEST) for spec in command.manifest
    )


def undo_size(command: BeginUpdate, catalog: Catalog) -> tuple[int, int]:
    """Bytes that this rank stores for the tensors that will come, and in how many places."""
    announced = [spec.name for spec in command.manifest] or list(catalog.names)
    units = catalog.written(announced)
    num_views = sum(len(catalog.views(unit)) for unit in units)
    return sum(catalog.held_bytes(unit) for unit in units), num_views
