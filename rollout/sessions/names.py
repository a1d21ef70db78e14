"""Ids that clients may give sessions and rollouts, which are parts of paths."""

from __future__ import annotations

import re

from engine.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str, field: str) -> None:
    """Raise InvalidRequest (`field`) for an id that is no part of a path."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{field} is {name[:100]!r}; an id has up to 128 letters, digits, '.', '_' and '-', "
            "the first a letter or digit",
            field=field,
        )
