"""Whether an update is held in a shadow or written in place."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from engine.errors import OutOfMemory
from engine.protocol import ITEM_BYTES, BeginUpdate
from engine.weights.catalog import Catalog

logger = logging.getLogger(__name__)

REFUSED, IN_PLACE, SHADOW = 0, 1, 2
"""In this order, so that the least over ranks is what all of them can do."""

_MARGIN_BYTES = {"cuda": 512 << 20, "cpu": 16 << 20}
_WIDEST = 8


def choose_mode(
    command: BeginUpdate,
    catalog: Catalog,
    device: torch.device,
    free: Callable[[torch.device], int],
) -> int:
    """IN_PLACE or SHADOW for an update of full tensors on `device`.

    free: bytes that can be allocated there. Raises OutOfMemory, with its arithmetic, for a
    shadow that was asked for and does not fit.
    """
    if command.mode == "in_place":
        return IN_PLACE
    needed = shadow_bytes(command, catalog)
    usable = free(device) - _MARGIN_BYTES.get(device.type, 0)
    fits = needed <= usable
    if command.mode == "shadow" and not fits:
        raise OutOfMemory(
            f"a shadow of {needed / 2**30:.2f} GiB does not fit: {max(usable, 0) / 2**30:.2f} GiB "
            "can be used; begin with mode 'in_place', or give the KV pool less",
            field="mode",
        )
    logger.log(
        logging.DEBUG if fits else logging.INFO,
        "update to version %d: %s (%d bytes to come, %d usable)",
        command.version,
        "shadow" if fits else "in place",
        needed,
        usable,
    )
    return SHADOW if fits else IN_PLACE


def shadow_bytes(command: BeginUpdate, catalog: Catalog) -> int:
    """Bytes of the full tensors that will come; without a manifest, those of the model."""
    if not command.manifest:
        return catalog.full_bytes()
    return sum(
        math.prod(spec.shape) * ITEM_BYTES.get(spec.dtype, _WIDEST) for spec in command.manifest
    )
