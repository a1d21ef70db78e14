"""Threads that move matchers and ask them for masks, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import consume_token_par, fill_next_token_bitmask_par

from engine.protocol import BitArray
from rollout.masks.grammar.following import Following
from rollout.masks.grammar.panics import contained

_MOST_THREADS = 16
_LEFT_CORES = 2
"""For the leader, and for the thread that hands the work out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A row whose matcher has to consume `tokens`; then its mask goes into row `number` of the
    bits."""

    number: int
    following: Following
    tokens: list[int]


@dataclass(frozen=True)
class Ran:
    """filled: rows of the bits that were written. unfit: turns whose tokens are none of their
    grammar. broken: turns that have no mask."""

    filled: list[int]
    unfit: list[Turn]
    broken: list[Turn]


class Crew:
    """Matchers of one start (`starts.Start`) wait for one another, so one thread asks them, in
    turn; those of different starts are asked at once.

    A thread hands all its rows to llguidance at once, which lets go of the interpreter meanwhile.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        """num_threads: one a core, but two, by default."""
        cores = (os.cpu_count() or 1) - _LEFT_CORES
        self.num_threads = num_threads or max(1, min(cores, _MOST_THREADS))
        self._executors = [LLExecutor(1) for _ in range(self.num_threads)]
        # The caller is one of them.
        self._others = ThreadPoolExecutor(max(1, self.num_threads - 1), thread_name_prefix="mask")

    def run(self, turns: Sequence[Turn], bits: BitArray) -> Ran:
        """Move all matchers, and write the masks of those that are within their grammar.

        bits: uint32 [rows, words], words for the tokens of the grammar's vocabulary. Raises Panic;
        then it is not known how far any of the matchers has come.
        """
        shares: dict[int, list[Turn]] = {}
        for turn in turns:
            shares.setdefault(turn.following.start.serial, []).append(turn)
        # Those with most rows first: a thread that is done takes the next.
        left = sorted(shares.values(), key=len)
        found: list[Ran] = []

        def work(executor: LLExecutor) -> None:
            while left:
                try:
                    share = left.pop()
                except IndexError:
                    return
                found.append(_in_turn(executor, share, bits))

        own, *others = self._executors[: len(left)] or self._executors[:1]
        jobs = [self._others.submit(work, executor) for executor in others]
        try:
            work(own)
        finally:
            # Nobody writes into the bits of a call that is over.
            wait(jobs)
        for job in jobs:
            job.result()
        return Ran(
            [number for one in found for number in one.filled],
            [turn for one in found for turn in one.unfit],
            [turn for one in found for turn in one.broken],
        )

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._others.shutdown(wait=False, cancel_futures=True)


def _in_turn(executor: LLExecutor, turns: Sequence[Turn], bits: BitArray) -> Ran:
    """What `Crew.run` does, of the rows of one thread."""
    single = [turn for turn in turns if len(turn.tokens) == 1]
    pairs = [(turn.following.matcher, turn.tokens[0]) for turn in single]
    fits = contained(consume_token_par, executor, pairs) if pairs else []
    unfit = [turn for turn, fit in zip(single, fits, strict=True) if not fit]
    for turn in turns:
        matcher = turn.following.matcher
        if len(turn.tokens) > 1 and not contained(matcher.consume_tokens, turn.tokens):
            unfit.append(turn)
    lost = {turn.number for turn in unfit}
    inside = [
        turn
        for turn in turns
        if turn.following.begun and not turn.following.over and turn.number not in lost
    ]
    if inside:
        matchers = [(turn.following.matcher, turn.number) for turn in inside]
        contained(fill_next_token_bitmask_par, executor, matchers, bits.view(np.int32))
    broken = [turn for turn in inside if turn.following.matcher.is_error()]
    return Ran([turn.number for turn in inside], unfit, broken)
