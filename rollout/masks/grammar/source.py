"""Masks of `Request.grammar`, computed beside the forward pass.

The matchers of a step advance and are asked by one thread, which hands both to llguidance's own
threads; that lets go of the interpreter, so the leader's thread goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from llguidance import LLExecutor
from llguidance.numpy import consume_token_par, fill_next_token_bitmask_par

from engine.errors import UnmetConstraint
from engine.protocol import BitArray, Request
from rollout.masks.base import MaskedRow, MaskOf, PendingMask, num_words
from rollout.masks.grammar.compile import told
from rollout.masks.grammar.compiled import CompiledGrammar, CompiledGrammars
from rollout.masks.grammar.following import Following
from rollout.masks.grammar.vocabulary import Vocabulary

_ALL = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A row, and the matcher at the beginning of its grammar."""

    row: MaskedRow
    start: CompiledGrammar


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """bits: uint32 [rows, words]. errors: of rows that have no mask, by index."""

    bits: BitArray
    errors: dict[int, Exception] = field(default_factory=dict)


class GrammarMasks:
    """A `MaskSource`. Nothing is loaded, and no thread started, before a request has a grammar."""

    def __init__(
        self, load: Callable[[], Vocabulary], *, vocab_size: int, eos_ids: Sequence[int]
    ) -> None:
        """load: the model's tokens, `vocab_size` of them. eos_ids: the model's; of a request that
        nothing ends, they alone come once its text is whole."""
        self._compiled = CompiledGrammars(load)
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor: LLExecutor | None = None
        # Touched by the thread of `_steps` alone.
        self._following: dict[str, Following] = {}

    def wants(self, request: Request) -> bool:
        """Whether it has a grammar."""
        return request.grammar is not None

    def prepare(self, request: Request) -> bool:
        """Compile its grammar; whether that is done, or failed."""
        return request.grammar is None or self._compiled.prepare(request.grammar)

    def ask(self, rows: Sequence[MaskedRow]) -> list[PendingMask]:
        """The masks of all rows whose grammars are compiled are one job; the others come each by
        itself."""
        wanted = []
        for row in rows:
            assert row.request.grammar is not None
            wanted.append(_Wanted(row=row, start=self._compiled.get(row.request.grammar)))
        ready = [one for one in wanted if one.start.done()]
        job = self._submit(ready) if ready else None
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
        self._steps.submit(self._following.pop, rid, None)

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._compiled.close()
        self._steps.shutdown(wait=False, cancel_futures=True)

    def _submit(self, wanted: list[_Wanted]) -> _Job:
        return _Job(self._steps.submit(self._compute, wanted), num_words(self._vocab_size))

    def _compute(self, wanted: list[_Wanted]) -> _Masks:
        """The masks of some rows, in their order."""
        if self._executor is None:
            self._executor = LLExecutor()
        # One token more than there are: that of a text that is whole.
        end_word, end_bit = divmod(self._vocab_size, 32)
        bits = np.zeros((len(wanted), end_word + 1), np.uint32)
        errors: dict[int, Exception] = {}
        moved = self._moved(wanted, errors)
        inside = [
            (one.matcher, number) for number, one in moved.items() if one.begun and not one.over
        ]
        if inside:
            fill_next_token_bitmask_par(self._executor, inside, bits.view(np.int32))
        for matcher, number in inside:
            if matcher.is_error():
                errors[number] = UnmetConstraint(
                    f"grammar: nothing can come next: {told(matcher)}", field="grammar"
                )
        for number, one in moved.items():
            if not one.begun:
                bits[number] = _ALL
        whole = (bits[:, end_word] >> np.uint32(end_bit)) & np.uint32(1) == 1
        for number, one in moved.items():
            whole[number] = one.begun and (one.over or whole[number])
        self._set_ending(bits, whole, moved)
        return _Masks(bits=bits, errors=errors)

    def _moved(self, wanted: list[_Wanted], errors: dict[int, Exception]) -> dict[int, Following]:
        """Those of the rows whose matchers have consumed their tokens, by index."""
        assert self._executor is not None
        moved: dict[int, Following] = {}
        single: list[tuple[int, int]] = []
        for number, one in enumerate(wanted):
            try:
                following = self._of(one)
                tokens = following.move(one.row.output_ids)
            except Exception as error:
                # A boundary: what is wrong with one row is its own.
                errors[number] = error
                continue
            moved[number] = following
            if len(tokens) == 1:
                single.append((number, tokens[0]))
            elif tokens and not following.matcher.consume_tokens(tokens):
                errors[number] = self._unfit(moved.pop(number))
        pairs = [(moved[number].matcher, token) for number, token in single]
        fit = consume_token_par(self._executor, pairs) if pairs else []
        for (number, _), fits in zip(single, fit, strict=True):
            if not fits:
                errors[number] = self._unfit(moved.pop(number))
        return moved

    def _of(self, wanted: _Wanted) -> Following:
        request = wanted.row.request
        found = self._following.get(request.rid)
        # An id may come again, with another request, before its end was told.
        if found is None or found.request is not request:
            ending_ids = request.stop_ids or self._eos_ids
            found = Following(request, wanted.start.matcher(), ending_ids)
            self._following[request.rid] = found
        return found

    def _unfit(self, following: Following) -> UnmetConstraint:
        """What is said of output tokens that are none of the grammar. Nothing is known of where it
        stands any more."""
        del self._following[following.request.rid]
        return UnmetConstraint(
            "grammar: it cannot go on behind the output tokens so far, those that came with the "
            f"request among them: {told(following.matcher)}",
            field="grammar",
        )

    def _set_ending(
        self,
        bits: BitArray,
        whole: np.ndarray[tuple[int], np.dtype[np.bool_]],
        moved: dict[int, Following],
    ) -> None:
        """Ending tokens may come where a text is whole, and nowhere else."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, one in moved.items():
            alike.setdefault(one.ending_ids, []).append(number)
        for ending_ids, numbers in alike.items():
            rows = np.array(numbers)
            for token in ending_ids:
                word, bit = token // 32, np.uint32(1 << (token % 32))
                bits[rows, word] &= ~bit
                bits[rows[whole[rows]], word] |= bit


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


class _Late:
    """The mask of a row whose grammar is still compiled."""

    def __init__(self, wanted: _Wanted, submit: Callable[[list[_Wanted]], _Job]) -> None:
        self._wanted = wanted
        self._submit = submit
        self._mask: PendingMask | None = None

    def done(self) -> bool:
        """Whether it is there; asks for it once it can be."""
        if self._mask is None and self._wanted.start.done():
            self._mask = MaskOf(self._submit([self._wanted]), 0)
        return self._mask is not None and self._mask.done()

    def result(self) -> BitArray | None:
        """The mask."""
        assert self._mask is not None
        return self._mask.result()
