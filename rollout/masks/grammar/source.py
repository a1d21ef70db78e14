"""Masks of `Request.grammar`, computed beside the forward pass.

One thread finds out what the matchers of a step have to consume, and a `Crew` of threads moves and
asks them; llguidance lets go of the interpreter, so the leader's thread goes on meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from engine.errors import UnmetConstraint
from engine.protocol import BitArray, Request
from rollout.masks.base import MaskedRow, MaskOf, PendingMask, num_words
from rollout.masks.grammar.compile import told
from rollout.masks.grammar.compiled import CompiledGrammar, CompiledGrammars, Ends
from rollout.masks.grammar.crew import Crew, Turn
from rollout.masks.grammar.following import Following
from rollout.masks.grammar.panics import Panic
from rollout.masks.grammar.spread import spread
from rollout.masks.grammar.starts import ROWS_OF_A_START, least_followed
from rollout.masks.grammar.vocabulary import Vocabulary
from rollout.masks.states.states import State

logger = logging.getLogger(__name__)

_ALL = np.uint32(0xFFFFFFFF)
_STARTS_OF_A_THREAD = 2
"""More even out what masks of unequal cost leave to the last thread."""


_MOST_WALKED = 4096
"""Tokens of outputs that came with their requests, of which states are found beside one step."""


class _Wanted(NamedTuple):
    """A row, and its grammar."""

    row: MaskedRow
    grammar: CompiledGrammar


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """bits: uint32 [rows, words]. states: of the outputs; None where that is not known. errors: of
    rows that have no mask, by index."""

    bits: BitArray
    states: list[State | None]
    errors: dict[int, Exception] = field(default_factory=dict)


class GrammarMasks:
    """A `MaskSource`. Nothing is loaded, and no thread started, before a request has a grammar, but
    by `load`."""

    def __init__(
        self,
        load: Callable[[], Vocabulary],
        *,
        vocab_size: int,
        eos_ids: Sequence[int],
        num_threads: int | None = None,
    ) -> None:
        """load: the model's tokens, `vocab_size` of them. eos_ids: the model's; of a request that
        nothing ends, they alone come once its text is whole. num_threads: as `Crew` has it."""
        self._compiled = CompiledGrammars(load)
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._num_threads = num_threads
        # Touched by the thread of `_steps` alone.
        self._crew: Crew | None = None
        self._following: dict[str, Following] = {}

    def load(self) -> None:
        """Load what the first grammar would. That holds the interpreter for up to two seconds, in
        which nothing else of this process runs."""
        self._compiled.load()

    def wants(self, request: Request) -> bool:
        """Whether it has a grammar."""
        return request.grammar is not None

    def prepare(self, request: Request) -> bool:
        """Compile its grammar; whether that is done, or failed."""
        return request.grammar is None or self._compiled.prepare(request.grammar)

    def ask(self, rows: Sequence[MaskedRow]) -> list[PendingMask]:
        """The masks of all rows whose grammars are compiled are one job; the others come each by
        itself."""
        wanted = [_Wanted(row, self._grammar(row.request)) for row in rows]
        ready = [one for one in wanted if one.grammar.done()]
        job = self._submit(ready) if ready else None
        if job is not None and len(ready) == len(wanted):
            return [MaskOf(job, number) for number in range(len(ready))]
        index = {one.row.row: number for number, one in enumerate(ready)}
        found: list[PendingMask] = []
        for one in wanted:
            if job is not None and one.row.row in index:
                found.append(MaskOf(job, index[one.row.row]))
            else:
                found.append(_Late(one, self._submit))
        return found

    def forget(self, rid: str) -> None:
        """Drop where that request stood."""
        self._steps.submit(self._drop, rid)

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._compiled.close()
        if self._crew is not None:
            self._crew.close()
        self._steps.shutdown(wait=False, cancel_futures=True)

    def _submit(self, wanted: list[_Wanted]) -> _Job:
        return _Job(self._steps.submit(self._compute, wanted), num_words(self._vocab_size))

    def _compute(self, wanted: list[_Wanted]) -> _Masks:
        """The masks of some rows, in their order."""
        try:
            return self._computed(wanted)
        except Panic as error:
            # Whose it is was not said, nor how far the matchers of the others have come.
            for one in wanted:
                self._drop(one.row.request.rid)
            if len(wanted) > 1:
                return _joined([self._compute([one]) for one in wanted])
            logger.error("the grammar of request %s: %s", wanted[0].row.request.rid, error)
            nothing = np.zeros((1, self._vocab_size // 32 + 1), np.uint32)
            ended = UnmetConstraint(f"grammar: it cannot go on: {error}", field="grammar")
            return _Masks(bits=nothing, states=[None], errors={0: ended})

    def _computed(self, wanted: list[_Wanted]) -> _Masks:
        # One token more than there are: that of a text that is whole.
        end_word, end_bit = divmod(self._vocab_size, 32)
        bits = np.empty((len(wanted), end_word + 1), np.uint32)
        errors: dict[int, Exception] = {}
        turns = self._turns(wanted, errors)
        ran = self._running_crew().run(turns, bits)
        for turn in ran.unfit:
            errors[turn.number] = self._unfit(turn.following)
        for turn in ran.broken:
            errors[turn.number] = UnmetConstraint(
                f"grammar: nothing can come next: {told(turn.following.matcher)}", field="grammar"
            )
        empty = np.ones(len(wanted), np.bool_)
        empty[ran.filled] = False
        bits[empty] = 0
        whole = (bits[:, end_word] >> np.uint32(end_bit)) & np.uint32(1) == 1
        for turn in turns:
            if not turn.following.begun:
                bits[turn.number] = _ALL
                whole[turn.number] = False
            elif turn.following.over:
                whole[turn.number] = True
        bits[:, end_word] &= np.uint32((1 << end_bit) - 1)
        self._set_ending(bits, whole, turns)
        states = self._learned(wanted, turns, bits, errors)
        return _Masks(bits=bits, states=states, errors=errors)

    def _learned(
        self,
        wanted: Sequence[_Wanted],
        turns: Sequence[Turn],
        bits: BitArray,
        errors: Mapping[int, Exception],
    ) -> list[State | None]:
        """Remember the masks, for all outputs that will be in the same states."""
        found: list[State | None] = [None] * len(wanted)
        left = _MOST_WALKED
        for turn in turns:
            if turn.number in errors:
                continue
            row, grammar = wanted[turn.number]
            state = row.course
            states = grammar.states(_ends(turn.following))
            if not isinstance(state, State):
                left -= len(row.output_ids)
                if left < 0 and left + len(row.output_ids) < _MOST_WALKED:
                    # Others came first; it is asked about again with its next token.
                    continue
                state = states.walk(row.output_ids.tolist())
            states.learn(state, bits[turn.number])
            found[turn.number] = state
        return found

    def _running_crew(self) -> Crew:
        if self._crew is None:
            self._crew = Crew(self._num_threads)
        return self._crew

    def _turns(self, wanted: list[_Wanted], errors: dict[int, Exception]) -> list[Turn]:
        """What each row's matcher has to consume; rows of a grammar that many follow are spread
        over its starts first."""
        turns: list[Turn] = []
        alike: dict[int, tuple[CompiledGrammar, list[Following]]] = {}
        found: list[tuple[int, MaskedRow, Following]] = []
        for number, (row, grammar) in enumerate(wanted):
            try:
                following = self._of(row.request, grammar)
            except Exception as error:
                # A boundary: what is wrong with one row is its own.
                errors[number] = error
                continue
            found.append((number, row, following))
            alike.setdefault(id(grammar), (grammar, []))[1].append(following)
        for grammar, rows in alike.values():
            if len(rows) > ROWS_OF_A_START and self._running_crew().num_threads > 1:
                starts = -(-len(rows) // ROWS_OF_A_START)
                grammar.grow(min(starts, _STARTS_OF_A_THREAD * self._running_crew().num_threads))
                spread(rows, grammar.starts())
        for number, row, following in found:
            try:
                tokens = following.move(row.output_ids)
            except Exception as error:
                # A boundary, as above.
                errors[number] = error
                continue
            turns.append(Turn(number=number, following=following, tokens=tokens))
        return turns

    def _grammar(self, request: Request) -> CompiledGrammar:
        assert request.grammar is not None
        return self._compiled.get(request.grammar)

    def _of(self, request: Request, grammar: CompiledGrammar) -> Following:
        found = self._following.get(request.rid)
        # An id may come again, with another request, before its end was told.
        if found is None or found.request is not request:
            ending_ids = request.stop_ids or self._eos_ids
            start = least_followed(grammar.starts())
            self._drop(request.rid)
            found = self._following[request.rid] = Following(request, start, ending_ids)
        return found

    def _drop(self, rid: str) -> None:
        found = self._following.pop(rid, None)
        if found is not None:
            found.leave()

    def _unfit(self, following: Following) -> UnmetConstraint:
        """What is said of output tokens that are none of the grammar. Nothing is known of where it
        stands any more."""
        self._drop(following.request.rid)
        return UnmetConstraint(
            "grammar: it cannot go on behind the output tokens so far, those that came with the "
            f"request among them: {told(following.matcher)}",
            field="grammar",
        )

    def _set_ending(
        self,
        bits: BitArray,
        whole: np.ndarray[tuple[int], np.dtype[np.bool_]],
        turns: Sequence[Turn],
    ) -> None:
        """Ending tokens may come where a text is whole, and nowhere else."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for turn in turns:
            alike.setdefault(turn.following.ending_ids, []).append(turn.number)
        for ending_ids, numbers in alike.items():
            rows = np.array(numbers)
            for token in ending_ids:
                word, bit = token // 32, np.uint32(1 << (token % 32))
                bits[rows, word] &= ~bit
                bits[rows[whole[rows]], word] |= bit


def _ends(following: Following) -> Ends:
    assert following.request.grammar is not None
    return Ends(tuple(following.request.grammar.after_ids), following.ending_ids)


def _joined(parts: Sequence[_Masks]) -> _Masks:
    """One of masks of a row each."""
    errors = {number: part.errors[0] for number, part in enumerate(parts) if part.errors}
    bits = np.concatenate([part.bits for part in parts])
    return _Masks(bits=bits, states=[part.states[0] for part in parts], errors=errors)


@dataclass(frozen=True)
class _Job:
    """`PendingMasks` of the rows of a job."""

    job: Future[_Masks]
    num_words: int

    def done(self) -> bool:
        """Whether the job is."""
        return self.job.done()

    def results(self) -> tuple[BitArray, Mapping[int, Exception]]:
        """The masks, and what stands in the way of some."""
        masks = self.job.result()
        return masks.bits[:, : self.num_words], masks.errors

    def courses(self) -> Sequence[State | None]:
        """Where the outputs stand."""
        return self.job.result().states


class _Late:
    """The mask of a row whose grammar is still compiled."""

    def __init__(self, wanted: _Wanted, submit: Callable[[list[_Wanted]], _Job]) -> None:
        self._wanted = wanted
        self._submit = submit
        self._mask: PendingMask | None = None

    def done(self) -> bool:
        """Whether it is there; asks for it once it can be."""
        if self._mask is None and self._wanted.grammar.done():
            self._mask = MaskOf(self._submit([self._wanted]), 0)
        return self._mask is not None and self._mask.done()

    def result(self) -> BitArray | None:
        """The mask."""
        assert self._mask is not None
        return self._mask.result()
