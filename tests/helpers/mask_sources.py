"""Sources of masks that behave as a test says: slow, silent, broken, or allowing nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.protocol import BitArray, Request
from rollout.masks.base import MaskedRow, bits_of
from tests.helpers.fake_executor import VOCAB_SIZE

NEVER = 10**9


class Broken(Exception):
    """No error of ours."""


@dataclass
class CountedMask:
    """A mask that is there after so many looks; `bits` an error is raised in its place."""

    looks: int
    bits: BitArray | Exception | None

    def done(self) -> bool:
        """Counts a look."""
        self.looks -= 1
        return self.looks < 0

    def result(self) -> BitArray | None:
        """The mask; raises the error."""
        if isinstance(self.bits, Exception):
            raise self.bits
        return self.bits


@dataclass
class CountedMasks:
    """`PendingMasks` that are there after so many looks; `error` is raised in their place."""

    looks: int
    bits: BitArray
    errors: dict[int, Exception]
    error: Exception | None = None

    def done(self) -> bool:
        """Counts a look."""
        self.looks -= 1
        return self.looks < 0

    def results(self) -> tuple[BitArray, dict[int, Exception]]:
        """The masks; raises the error."""
        if self.error is not None:
            raise self.error
        return self.bits, self.errors

    def courses(self) -> list[None]:
        """None is known."""
        return [None] * len(self.bits)


@dataclass
class ScriptedSource:
    """A source of all requests whose id begins with `prefix`.

    rule: from a request's id and its output tokens so far to looks until its mask is there, and
        tokens that it allows, None for any, or an error.
    unprepared: looks until a request is prepared, by its id. asked: what it was asked for, in
        order. forgotten: ids.
    """

    rule: Callable[[str, list[int]], tuple[int, Sequence[int] | Exception | None]]
    prefix: str = "m"
    vocab_size: int = VOCAB_SIZE
    unprepared: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, list[int]]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def wants(self, request: Request) -> bool:
        """By its id."""
        return request.rid.startswith(self.prefix)

    def prepare(self, request: Request) -> bool:
        """Counts a look."""
        left = self.unprepared.get(request.rid, 0)
        self.unprepared[request.rid] = left - 1
        return left <= 0

    def ask(self, rows: Sequence[MaskedRow]) -> list[CountedMask]:
        """As the rule says."""
        found = []
        for row in rows:
            outputs = row.output_ids.tolist()
            self.asked.append((row.request.rid, outputs))
            looks, allowed = self.rule(row.request.rid, outputs)
            bits = allowed
            if not isinstance(allowed, Exception) and allowed is not None:
                bits = bits_of(np.array(allowed, np.int64), self.vocab_size)
            found.append(CountedMask(looks, bits))
        return found

    def forget(self, rid: str) -> None:
        """Noted."""
        self.forgotten.append(rid)

    def close(self) -> None:
        """There is nothing to end."""
