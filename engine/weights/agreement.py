"""What the ranks of a replica agree on before any of them goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from engine.errors import ManifestMismatch, SlipstreamError, WeightUpdateError

T = TypeVar("T")


class Agreement:
    """least: the least of every rank's value (int64). Every rank makes the same calls."""

    def __init__(self, least: Callable[[int], int]) -> None:
        self.least = least

    def run(self, act: Callable[[], T]) -> T:
        """What `act` returns, if no rank's failed; each rank answers, whatever happens in it."""
        succeeded = agreed = False
        try:
            result = act()
            succeeded = True
        finally:
            agreed = self.least(int(succeeded)) == 1
        settle(None, agreed)
        return result

    def join(self, digest: int, refusal: SlipstreamError | None) -> None:
        """All ranks take part, and in the same, before anything moves.

        digest: of what this rank is to take in, from `digest_of`. refusal: why it cannot.
        Raises it, or that another rank has one, or ManifestMismatch.
        """
        mine = 0 if refusal is not None else 1 + digest
        low, high = self.least(mine), -self.least(-mine)
        settle(refusal, low != 0)
        _require_alike(low, high)

    def require_alike(self, digest: int) -> None:
        """Raise ManifestMismatch, on every rank, unless all have the same digest."""
        _require_alike(self.least(digest), -self.least(-digest))


def settle(error: SlipstreamError | None, agreed: bool) -> None:
    """Raise this rank's error, or that another has one."""
    if error is not None:
        raise error
    if not agreed:
        raise WeightUpdateError(
            "another rank of this engine refuses; its error is reported too", field="ranks"
        )


def _require_alike(low: int, high: int) -> None:
    if low != high:
        raise ManifestMismatch(
            "the ranks of this engine did not get the same tensors: send every rank the same "
            "names, shapes and dtypes",
            field="ranks",
        )
