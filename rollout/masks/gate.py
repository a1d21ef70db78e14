"""The step whose sampling waits for masks: asks for them, and says when all are there.

At most one step waits: no later one is launched before the masks of this one were sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np

from engine.errors import MaskError, MaskTimeout, SlipstreamError, UnmetConstraint
from engine.protocol import BitArray, Request, TokenRows
from engine.protocol.deadlines import MASK_S
from rollout.masks.base import (
    Course,
    KnownMask,
    MaskedRow,
    MaskSource,
    PendingMask,
    banned_ids,
    bits_of,
)
from rollout.masks.together import look_together
from rollout.scheduler.emit import StepOutput

A = TypeVar("A")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_SHORTEST_PAUSE_S = 0.00005
_LONGEST_PAUSE_S = 0.001
_SHARE_WAITED = 0.125
_NOTHING: Mapping[int, KnownMask] = MappingProxyType({})
_WHOLE_LOOK = 8
"""Of so many looks one is at every row, the first among them; the others are at the first row that
is missing, since a step may have hundreds."""


@dataclass(frozen=True)
class FoundMasks:
    """Rows of a step, ascending, those of all copies, and the mask of each. courses: where outputs
    stand, of rows whose sources said so."""

    rows: list[int]
    masks: list[KnownMask]
    courses: list[tuple[MaskedRow, Course]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one look found.

    masks: all of the step, once nothing is waited for any more. failed: requests that have to end
    now, by id, and why; their rows are not among those.
    """

    masks: FoundMasks | None
    failed: list[tuple[str, SlipstreamError]] = field(default_factory=list)


class _Awaited(NamedTuple):
    row: MaskedRow
    parts: Sequence[PendingMask]


@dataclass(kw_only=True)
class _Open:
    """The step that waits. found: masks that are there, by row. courses: as in
    `FoundMasks`. num_looks: how often it was looked at."""

    since: float
    until: float
    awaited: list[_Awaited]
    failed: list[tuple[str, SlipstreamError]]
    found: dict[int, KnownMask] = field(default_factory=dict)
    courses: list[tuple[MaskedRow, Course]] = field(default_factory=list)
    pause_s: float = 0.0
    num_looks: int = 0


class MaskGate:
    """Driven by the leader: `open` once the tokens before the step are known, `look` until it gives
    the frame. A mask that is late, wrong or allows nothing ends its own request only."""

    def __init__(
        self,
        sources: Sequence[MaskSource],
        *,
        vocab_size: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """timeout_s: how long a step may wait, at most `MASK_S`. clock: seconds that only grow."""
        self._sources = sources
        self.vocab_size = vocab_size
        self._timeout_s = min(timeout_s, MASK_S)
        self._clock = clock
        self._open: _Open | None = None
        self._asked: set[str] = set()
        self._inside = bits_of(range(vocab_size), vocab_size)

    @property
    def pause_s(self) -> float:
        """How long to wait until the next look: not at all until the first, then a share of what
        was waited so far, so that little is lost of a short wait."""
        assert self._open is not None, "no step waits"
        pause_s = self._open.pause_s
        waited_s = self._clock() - self._open.since
        longest_s = min(_SHARE_WAITED * waited_s, _LONGEST_PAUSE_S)
        self._open.pause_s = max(longest_s, _SHORTEST_PAUSE_S)
        return pause_s

    def prepared(self, request: Request) -> bool:
        """Whether the masks of a request can be asked for, or will never be there; begins what is
        missing."""
        if not request.masked:
            return True
        try:
            return all(
                _guarded(request, source.prepare, request)
                for source in self._sources
                if _guarded(request, source.wants, request)
            )
        except SlipstreamError:
            # What failed fails again when the mask is asked for, and ends the request then.
            return True

    def open(self, rows: Sequence[MaskedRow], known: Mapping[int, KnownMask] = _NOTHING) -> None:
        """A step waits for the masks of `rows`, which are asked for now. known: those of other
        rows, which are sound."""
        assert self._open is None, "two steps wait for masks"
        self._asked.update([row.request.rid for row in rows])
        parts, failed = self._ask(rows)
        found = dict(known)
        awaited = []
        for row in rows:
            asked = parts[row.row]
            if row.request.rid in failed:
                continue
            if (mask := _known(row, asked)) is not None:
                found[row.row] = mask
            else:
                awaited.append(_Awaited(row, asked))
        now = self._clock()
        self._open = _Open(
            since=now,
            until=now + self._timeout_s,
            awaited=awaited,
            failed=list(failed.items()),
            found=found,
        )

    def look(self, runs: Callable[[MaskedRow], bool]) -> Answer:
        """What came. runs: whether the sequence of a row does; nothing is waited for on behalf of
        one that has ended. The gate is closed once the frame is given."""
        found = self._open
        assert found is not None, "no step waits"
        late = self._clock() >= found.until
        found.num_looks += 1
        glance = found.pause_s > 0 and found.num_looks % _WHOLE_LOOK != 1
        if glance and not late and self._waits_still(found.awaited, runs):
            return Answer(masks=None)
        failed, found.failed = found.failed, []
        awaited = [each for each in found.awaited if runs(each.row)]
        found.awaited = []
        together = look_together(awaited, self._inside)
        for answered in together.answered:
            found.found[answered.row.row] = answered.mask
            if answered.course is not None:
                found.courses.append((answered.row, answered.course))
        for each in awaited:
            if each.row.row in found.found:
                continue
            try:
                if not late and not self._is_there(each, together.computed):
                    found.awaited.append(each)
                    continue
                bits = self._bits(each)
            except SlipstreamError as error:
                failed.append((each.row.request.rid, error))
                continue
            if bits is not None:
                found.found[each.row.row] = KnownMask(bits)
        if found.awaited:
            return Answer(masks=None, failed=failed)
        self._open = None
        return Answer(masks=self._all(found), failed=failed)

    def _waits_still(self, awaited: list[_Awaited], runs: Callable[[MaskedRow], bool]) -> bool:
        """Whether the first that is waited for still is: the frame has them all."""
        if not awaited or not runs(awaited[0].row):
            return False
        try:
            return not self._is_there(awaited[0], frozenset())
        except SlipstreamError:
            return False

    def close(self) -> None:
        """Give the step up that waits, if one does."""
        self._open = None

    def shut_down(self) -> None:
        """End what the sources have running. Idempotent."""
        for source in self._sources:
            source.close()

    def forget_ended(self, outputs: Iterable[StepOutput]) -> None:
        """Tell the sources which of the requests they were asked about are over."""
        if not self._asked:
            return
        for output in outputs:
            if isinstance(output, TokenRows):
                continue
            if output.finish is not None and output.rid in self._asked:
                self._asked.discard(output.rid)
                for source in self._sources:
                    _forget(source, output.rid)

    def _ask(
        self, rows: Sequence[MaskedRow]
    ) -> tuple[dict[int, list[PendingMask]], dict[str, SlipstreamError]]:
        """What is awaited, by row, and requests that cannot be waited for, by id."""
        parts: dict[int, list[PendingMask]] = {row.row: [] for row in rows}
        failed: dict[str, SlipstreamError] = {}
        for source in self._sources:
            wanted = []
            for row in rows:
                try:
                    if source.wants(row.request):
                        wanted.append(row)
                except Exception as error:
                    # A boundary, as in `_guarded`.
                    failed[row.request.rid] = _as_mask_error(row.request, error)
            if not wanted:
                continue
            try:
                answers = _answers(source, wanted)
            except Exception as error:
                # A boundary, as in `_guarded`.
                failed |= {row.request.rid: _as_mask_error(row.request, error) for row in wanted}
                continue
            for row, answer in zip(wanted, answers, strict=True):
                parts[row.row].append(answer)
        return parts, failed

    def _bits(self, awaited: _Awaited) -> BitArray | None:
        """What all parts allow; None for every token. Raises a typed error."""
        request = awaited.row.request
        whole: BitArray | None = None
        for part in awaited.parts:
            bits = self._part(request, part)
            if bits is not None:
                whole = bits if whole is None else whole & bits
        if whole is None:
            return None
        at = len(awaited.row.output_ids)
        banned = banned_ids(request, at)
        if banned:
            whole = whole & ~bits_of(banned, self.vocab_size)
        if not (whole & self._inside).any():
            # What may be in advance has been: of a grammar only its course tells.
            kind = MaskError if request.grammar is None else UnmetConstraint
            raise kind(
                f"nothing may come as output token {at}: the masks of this request, its logit_bias "
                "and min_new_tokens together rule out every token",
                field=_field(request),
            )
        return whole

    def _is_there(self, awaited: _Awaited, computed: Set[int]) -> bool:
        """computed: rows of which it is known that they are not."""
        if awaited.row.row in computed:
            return False
        return all(_guarded(awaited.row.request, _is_done, part) for part in awaited.parts)

    def _part(self, request: Request, part: PendingMask) -> BitArray | None:
        if not _guarded(request, _is_done, part):
            raise MaskTimeout(
                f"the mask of the next token was not there within {self._timeout_s:g} s, so the "
                "sequence ends with the tokens sampled before",
                field=_field(request),
            )
        bits = _guarded(request, _result, part)
        if bits is None:
            return None
        inside = self._inside
        if bits.dtype != inside.dtype or bits.shape != inside.shape:
            raise MaskError(
                f"a mask is {bits.dtype} {bits.shape} and must be {inside.dtype} {inside.shape}",
                field=_field(request),
            )
        return bits

    def _all(self, found: _Open) -> FoundMasks:
        rows = sorted(found.found)
        return FoundMasks(rows, [found.found[row] for row in rows], found.courses)


def _known(row: MaskedRow, parts: Sequence[PendingMask]) -> KnownMask | None:
    """The mask of a row that is there, in order, and all that restricts it."""
    if len(parts) != 1 or not isinstance(parts[0], KnownMask) or not parts[0].sound:
        return None
    return None if banned_ids(row.request, len(row.output_ids)) else parts[0]


def _answers(source: MaskSource, rows: Sequence[MaskedRow]) -> Sequence[PendingMask]:
    """What a source answers when asked; raises whatever it raises."""
    answers = list(source.ask(rows))
    if len(answers) != len(rows):
        raise MaskError(f"a source of masks gave {len(answers)} for {len(rows)} rows")
    return answers


def _is_done(part: PendingMask) -> bool:
    return part.done()


def _result(part: PendingMask) -> BitArray | None:
    bits = part.result()
    return None if bits is None else np.asarray(bits)


def _forget(source: MaskSource, rid: str) -> None:
    try:
        source.forget(rid)
    except Exception:
        # A boundary, as in `_guarded`: the request is over, whatever its source says to that.
        logger.exception("the source of masks of request %s", rid)


def _guarded(request: Request, call: Callable[[A], T], about: A) -> T:
    """What a source answers about a request; raises a typed error."""
    try:
        return call(about)
    except Exception as error:
        # A boundary: the source's own mistake is that of whoever wanted it.
        raise _as_mask_error(request, error) from error


def _as_mask_error(request: Request, error: Exception) -> SlipstreamError:
    """What the caller of a request is told of what its source raised."""
    if isinstance(error, SlipstreamError):
        return error
    logger.error("the mask of request %s", request.rid, exc_info=error)
    return MaskError(
        f"the mask of the next token failed: {type(error).__name__}: {error}", field=_field(request)
    )


def _field(request: Request) -> str:
    """The field that restricts its tokens."""
    if request.grammar is not None:
        return "grammar"
    return "" if request.allowed_token_ids is None else "allowed_token_ids"
