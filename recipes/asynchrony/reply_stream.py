"""Engines that are fed while they run: requests in at any time, finished replies out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.protocol import Request, RequestOutput


class ReplyStream(Protocol):
    """What asynchronous training needs of the engines of an `Actor`."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Start requests; those of a group are neighbours."""
        ...

    def poll(self) -> list[RequestOutput]:
        """Final outputs that there are; may be empty. The trainer waits for them."""
        ...

    def during_update(self) -> list[RequestOutput]:
        """Final outputs of what the engines did while the trainer computed an update."""
        ...

    def withdraw(self) -> list[RequestOutput]:
        """Take every request back. Final outputs: those that were not over end by an abort without
        an error, with the tokens they had."""
        ...

    def waits(self) -> dict[str, float]:
        """Figures of how long each side has waited for the other since the last call."""
        ...
