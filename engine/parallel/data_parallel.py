"""Ranks that hold whole copies of the model: they compute apart and agree together."""

from __future__ import annotations

from engine.parallel.collectives import NoCollectives
from engine.parallel.gloo import GlooCollectives


class WholeCopy(NoCollectives):
    """The collectives of a rank that shares its copy of the model with nobody, in a replica of
    several copies. host: all ranks of the replica."""

    description = "one rank a copy"

    def __init__(self, host: GlooCollectives) -> None:
        self._host = host

    def minimum(self, value: int) -> int:
        """The least of every rank's value."""
        return self._host.minimum(value)

    def agree(self, value: int) -> int:
        """The least of every rank's value."""
        return self._host.agree(value)

    def abort(self) -> None:
        """Give up on the other ranks."""
        self._host.abort()

    def close(self) -> None:
        """Leave the group."""
        self._host.close()
