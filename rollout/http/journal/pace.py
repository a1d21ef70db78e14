"""How fast sequences of a server grow, which says how many tokens may be kept back."""

from __future__ import annotations

_SHARE = 0.1
"""Of a new measurement in the mean."""


class Pace:
    """The mean seconds between two tokens of one sequence, of the calls that were measured."""

    def __init__(self) -> None:
        self._token_s = 0.0

    def note(self, num_tokens: int, seconds: float) -> None:
        """A sequence got so many tokens in that time."""
        measured = seconds / num_tokens
        self._token_s += (measured - self._token_s) * (_SHARE if self._token_s else 1.0)

    def tokens_within(self, seconds: float, most: int) -> int:
        """Tokens that a sequence gets in that time, from one to `most`; `most` if nothing was
        measured yet."""
        if not self._token_s:
            return most
        return max(1, min(most, int(seconds / self._token_s)))
