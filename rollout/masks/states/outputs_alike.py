"""Where the beginning of a text stands in a grammar of which nothing is known: at itself."""

from __future__ import annotations

from collections.abc import Hashable

_MOST_TOKENS = 64
"""Longer beginnings are rarely shared, and what they begin with is compared again and again."""


class OutputsAlike:
    """Reads texts of any grammar: those that are alike to the last token are in one state. The same
    characters in other tokens are not: some grammars count tokens."""

    start: tuple[int, ...] = ()

    def after(self, state: Hashable, token: int) -> tuple[int, ...] | None:
        """The state behind one token more; None behind too many."""
        assert isinstance(state, tuple)
        return (*state, token) if len(state) < _MOST_TOKENS else None

    def mask_key(self, state: Hashable) -> Hashable:
        """The state."""
        return state
