"""Rewards about form rather than truth."""

from __future__ import annotations


def overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """DAPO's soft over-long punishment (arXiv 2503.14476, eq. 13), in [-1, 0].

    length: response tokens. 0 up to max_length - buffer tokens, then falling linearly to -1 at
    max_length. A buffer of 0 turns it off.
    """
    if buffer <= 0:
        return 0.0
    over = length - (max_length - buffer)
    return -min(max(over / buffer, 0.0), 1.0)
