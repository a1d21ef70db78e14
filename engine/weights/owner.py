"""Whose the open update is: two trainers that push at once must not feed one update."""

from __future__ import annotations

import time

from engine.errors import UpdateOrder
from engine.protocol import BeginUpdate
from engine.weights.staging import OpenUpdate


def require_owner(update: OpenUpdate, owner: str, what: str) -> None:
    """Raise UpdateOrder for a command of another than `update`'s owner. what: names it."""
    if owner != update.begin.owner:
        raise UpdateOrder(f"{what} refused: {describe(update)}", field="owner")


def require_begin(update: OpenUpdate, command: BeginUpdate) -> None:
    """Raise UpdateOrder unless `command` may end the open update and begin in its place.

    Its owner's may at any time, also for another version: whoever begins the next one has given
    up the one before, and the abort of that may have been lost. Without owners nobody knows
    whose the tensors are that came, so that only an empty update is begun again.
    """
    if command.owner and command.owner == update.begin.owner:
        return
    if update.begin != command:
        raise UpdateOrder(
            f"version {command.version} cannot begin: {describe(update)}", field="version"
        )
    if not update.is_empty:
        raise UpdateOrder(
            f"it has received tensors, which may be another trainer's: {describe(update)}",
            field="version",
        )


def require_version(update: OpenUpdate, version: int) -> None:
    """Raise UpdateOrder for a command that names another version."""
    if update.version != version:
        raise UpdateOrder(
            f"the open update is to version {update.version}, not {version}: {describe(update)}",
            field="version",
        )


def describe(update: OpenUpdate) -> str:
    """Whose the open update is, how long it may take yet, and what ends it."""
    owner = update.begin.owner
    whose = f"begun by owner {owner!r}" if owner else "begun without an owner"
    drop = f"abort_update {update.version}" + (" with that owner" if owner else "")
    left = max(update.expires - time.monotonic(), 0.0)
    return (
        f"the update to version {update.version} is open, {whose}. Whoever began it commits or "
        f"aborts it; if that trainer is gone, {drop} drops it now, and in {left:.0f} s the next "
        "begin does"
    )
