"""What trying out may cost: a small share of the time, kept in an account."""

from __future__ import annotations

SHARE = 0.005
"""Part of all time that may be lost to verify steps which do not pay."""
_FIRST = 3.0
_MOST_EARNED = 4.0
_MOST_SAVED = 12.0
_LEAST = -3.0


class Allowance:
    """An account of time. It earns `SHARE` of every step and what drafting saves, and pays
    whatever drafting loses, so that no mistake of an estimate lasts.

    It begins with three plain steps. What is earned fills it up to four, what drafting saved up to
    twelve: so much is lost when drafts that paid cease to.
    """

    def __init__(self) -> None:
        self._balance: float | None = None

    def step(self, cost: float, plain: float) -> None:
        """A step of `cost` ran, where a plain one takes `plain`."""
        balance = _FIRST * plain if self._balance is None else self._balance
        self._balance = max(balance, min(balance + SHARE * cost, _MOST_EARNED * plain))

    def settle(self, saved: float, plain: float) -> None:
        """A verify step saved this much time against plain steps; below 0 it lost some."""
        assert self._balance is not None, "a step is settled once it is entered"
        self._balance = min(self._balance + saved, _MOST_SAVED * plain)

    def covers(self, loss: float) -> bool:
        """Whether `loss` may be risked."""
        return self._balance is not None and self._balance >= loss

    def overdrawn(self, plain: float) -> bool:
        """Whether drafting has lost more than is bearable, in plain steps of `plain`."""
        return self._balance is not None and self._balance < _LEAST * plain
