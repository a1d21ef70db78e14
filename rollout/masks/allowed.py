"""Masks of `Request.allowed_token_ids`: the same at every token, packed once a request."""

from __future__ import annotations

from collections.abc import Sequence

from engine.protocol import Request
from rollout.masks.base import KnownMask, MaskedRow, bits_of


class AllowedTokens:
    """A `MaskSource`."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._packed: dict[str, tuple[Request, KnownMask]] = {}

    def wants(self, request: Request) -> bool:
        """Whether it says which tokens are allowed."""
        return request.allowed_token_ids is not None

    def prepare(self, request: Request) -> bool:
        """Nothing has to be."""
        return True

    def ask(self, rows: Sequence[MaskedRow]) -> list[KnownMask]:
        """The masks, at once."""
        return [self._mask(row.request) for row in rows]

    def forget(self, rid: str) -> None:
        """Drop the mask of that request."""
        self._packed.pop(rid, None)

    def close(self) -> None:
        """There are no threads."""

    def _mask(self, request: Request) -> KnownMask:
        found = self._packed.get(request.rid)
        # An id may come again, with another request, before its end was told.
        if found is None or found[0] is not request:
            assert request.allowed_token_ids is not None
            bits = bits_of(request.allowed_token_ids, self._vocab_size)
            found = request, KnownMask(bits, sound=len(request.allowed_token_ids) > 0)
            self._packed[request.rid] = found
        return found[1]
