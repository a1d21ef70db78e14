"""Numbers that JSON has no word for.

JSON knows no NaN and no infinity. A series and the figures of tokens have null in their place,
which a chart draws as a gap; a single figure or reward keeps its name, as a string.
"""

from __future__ import annotations

import math

Number = float | str | None
"""A number, one of the strings "NaN", "Infinity" and "-Infinity", or null if none is known."""


def told(value: float | None) -> Number:
    """A single figure as it travels: what is not finite by its name."""
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def gap(value: float | None) -> float | None:
    """A point of a series as it travels: None for what is not finite."""
    return value if value is not None and math.isfinite(value) else None
