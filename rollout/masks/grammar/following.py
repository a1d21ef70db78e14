"""Where one output stands in its grammar, as its tokens come and go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from engine.protocol import IntArray, Request
from rollout.masks.grammar.panics import contained
from rollout.masks.grammar.starts import Start

_NOTHING: IntArray = np.empty(0, np.int32)


class Following:
    """Follows the output tokens of one request.

    `move` says which tokens its `matcher` has to consume next. The constraint begins behind
    `Grammar.after_ids`, and is over with the first token that ends the sequence.
    """

    def __init__(self, request: Request, start: Start, ending_ids: Iterable[int]) -> None:
        """start: of its grammar; it counts this row from now on. ending_ids: tokens that may come
        once the text is whole, and no sooner."""
        assert request.grammar is not None
        self.request = request
        self.ending_ids = tuple(ending_ids)
        self.matcher = contained(start.matcher.deep_copy)
        self.start = start
        start.num_rows += 1
        self._after: IntArray = np.array(request.grammar.after_ids, np.int32)
        self._seen = _NOTHING
        self._begin = -1 if len(self._after) else 0
        self._num_fed = 0
        self._over = False

    @property
    def begun(self) -> bool:
        """Whether the constraint has begun."""
        return self._begin >= 0

    @property
    def over(self) -> bool:
        """Whether an ending token has come since."""
        return self._over

    @property
    def num_fed(self) -> int:
        """Output tokens that `matcher` has consumed, once it was given those of the last `move`."""
        return self._num_fed

    def join(self, start: Start) -> None:
        """Go on from another start of the grammar: `matcher` is a copy of that one, which has
        consumed what this one had."""
        fed: list[int] = self._seen[self._begin :][: self._num_fed].tolist() if self.begun else []
        matcher = contained(start.matcher.deep_copy)
        if fed and not contained(matcher.consume_tokens, fed):
            return
        self.leave()
        start.num_rows += 1
        self.start, self.matcher = start, matcher

    def leave(self) -> None:
        """The row is over, or elsewhere: its start does not count it any more."""
        self.start.num_rows -= 1

    def move(self, output_ids: IntArray) -> list[int]:
        """The output is now `output_ids`, int32 [n], whatever it was before. Returns the tokens
        that `matcher`, which may have been moved back, has to consume."""
        size = len(self._seen)
        if (
            self.begun
            and not self._over
            and len(output_ids) == size + 1
            and self._begin + self._num_fed == size
            and output_ids[:size].tobytes() == self._seen.tobytes()
        ):
            # One token more, as of nearly every row of every step.
            self._seen = output_ids
            token = int(output_ids[size])
            if token in self.ending_ids:
                self._over = True
                return []
            self._num_fed += 1
            return [token]
        return self._moved(output_ids)

    def _moved(self, output_ids: IntArray) -> list[int]:
        kept = _num_common(self._seen, output_ids)
        if kept < len(self._seen):
            self._move_back(kept)
        self._seen = output_ids
        if not self.begun:
            self._begin = _behind(output_ids, self._after, max(0, kept - len(self._after) + 1))
        if not self.begun or self._over:
            return []
        tokens: list[int] = output_ids[self._begin + self._num_fed :].tolist()
        ends = [at for at, token in enumerate(tokens) if token in self.ending_ids]
        if ends:
            self._over = True
            tokens = tokens[: ends[0]]
        self._num_fed += len(tokens)
        return tokens

    def _move_back(self, num_tokens: int) -> None:
        """Of the output, only the first `num_tokens` tokens are left."""
        self._over = False
        if len(self._after) and num_tokens < self._begin:
            self._begin = -1
        left = max(0, num_tokens - self._begin) if self.begun else 0
        # An ending token, and what came behind it, was never fed.
        surplus = self._num_fed - left
        if surplus <= 0:
            return
        if not contained(self.matcher.rollback, surplus):
            self.matcher, left = contained(self.start.matcher.deep_copy), 0
        self._num_fed = left


def _num_common(one: IntArray, other: IntArray) -> int:
    """How many tokens both begin with."""
    size = min(len(one), len(other))
    different: np.ndarray[Any, np.dtype[np.bool_]] = one[:size] != other[:size]
    return int(different.argmax()) if different.any() else size


def _behind(tokens: IntArray, wanted: IntArray, start: int) -> int:
    """The index behind the first occurrence of `wanted` that begins at `start` or later; -1 if
    there is none."""
    starts = np.flatnonzero(tokens[start : len(tokens) - len(wanted) + 1] == wanted[0]) + start
    for at in starts.tolist():
        if np.array_equal(tokens[at : at + len(wanted)], wanted):
            return int(at) + len(wanted)
    return -1
