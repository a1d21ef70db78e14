"""Steps that know which of their rows attended to KV that was not finite."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from engine.attention.base import AttentionStep


@runtime_checkable
class WatchfulStep(Protocol):
    """A step of a back end that writes zeros for NaN. The other back ends keep NaN, which then
    reaches the logits of every row that attends to it."""

    def spoilt_rows(self) -> np.ndarray:
        """Rows that attended to such zeros, bool [R]; asked after the last layer."""
        ...


def spoilt_rows(step: AttentionStep) -> np.ndarray | None:
    """Rows of the step whose logits are not to be trusted, bool [R]; None if there are none."""
    if not isinstance(step, WatchfulStep):
        return None
    rows = step.spoilt_rows()
    return rows if rows.any() else None
