"""When a process that serves looks for garbage that reference counts do not find."""

from __future__ import annotations

import gc

_YOUNG, _MIDDLE, _OLD = 20_000, 20, 20
"""Objects between two looks at the young, and looks between those at the older ones. A request
makes hundreds and leaves no circles of them, so that with Python's own 700 nearly every request
would be looked through for nothing."""


def settle() -> None:
    """What was made until now stays to the end, and is not looked through again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
