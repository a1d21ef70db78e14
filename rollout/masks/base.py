"""What asks for masks and what answers: the interface of a source, and bits of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from engine.protocol import BitArray, IntArray, Request

WORD = 32


class Course(Protocol):
    """Where an output stands, as the source of its masks knows it."""

    @property
    def mask(self) -> KnownMask | None:
        """What may come next, sound and not to be written; None where it has to be computed."""
        ...

    def after(self, token: int) -> Course:
        """Where it stands behind one token more, which the mask allows."""
        ...


class MaskedRow(NamedTuple):
    """A row of a step that waits for its mask.

    row: its index among the rows of the step that sample, those of all copies of the model one
    behind the other. slot: of its sequence, on `copy`. output_ids: int32 [n], its output tokens so
    far, those among them that came with the request; a copy. course: where these stand, if its
    source has said so of the row and foreseen its tokens since.
    """

    row: int
    slot: int
    request: Request
    output_ids: IntArray
    copy: int = 0
    course: Course | None = None


class PendingMask(Protocol):
    """A mask that was asked for."""

    def done(self) -> bool:
        """Whether it is there, or will never be. Called again and again; does not wait."""
        ...

    def result(self) -> BitArray | None:
        """The mask, uint32 [ceil(vocabulary / 32)], not to be written; None where every token may
        come. For when it is done. Whatever it raises ends the request, and no other."""
        ...


class PendingMasks(Protocol):
    """Masks of several rows of a step, computed as one. A source that answers with `MaskOf` has
    them looked at as one too, which matters where rows are many."""

    def done(self) -> bool:
        """Whether all are there, or will never be. Does not wait."""
        ...

    def results(self) -> tuple[BitArray, Mapping[int, Exception]]:
        """The masks, uint32 [n, ceil(vocabulary / 32)], not to be written; by index, what stands in
        the way of some. For when they are done; may raise what stands in the way of all."""
        ...

    def courses(self) -> Sequence[Course | None]:
        """Where the output of each row stands, if that is known: `mask` of its course is the mask
        of the row, and its source is not asked about it again before it has to compute one. For
        when they are done."""
        ...


@dataclass(frozen=True)
class MaskOf:
    """A `PendingMask`: one of several."""

    masks: PendingMasks
    index: int

    def done(self) -> bool:
        """Whether all are."""
        return self.masks.done()

    def result(self) -> BitArray:
        """The mask; raises what stands in its way."""
        bits, errors = self.masks.results()
        if self.index in errors:
            raise errors[self.index]
        mask: BitArray = bits[self.index]
        return mask


class MaskSource(Protocol):
    """One reason why tokens may not come. A request may have several, and gets what all allow.

    Called by the leader's thread alone, between steps: `ask` must not take long, and leaves what
    does to threads of its own, which run beside the forward pass.
    """

    def wants(self, request: Request) -> bool:
        """Whether it restricts that request (`Request.masked` is then true)."""
        ...

    def prepare(self, request: Request) -> bool:
        """Begin, in a thread, what has to be there before the first mask of a wanted request;
        whether it is, or will never be. Called again and again: a request waits in the queue for
        it, so that no step does."""
        ...

    def ask(self, rows: Sequence[MaskedRow]) -> Sequence[PendingMask]:
        """A mask for each row, all of one step and all wanted, for the token behind `output_ids`.

        A row may come again with the same tokens, with more than one more, or with fewer: after a
        retraction, a step that failed, a restart. The same id may be that of another request.
        """
        ...

    def forget(self, rid: str) -> None:
        """The request of that id is over; one that is not known is no error."""
        ...

    def close(self) -> None:
        """End its threads, whatever they are at; nothing is asked any more. Idempotent."""
        ...


@dataclass(frozen=True, eq=False)
class KnownMask:
    """A mask that is there.

    sound: it has the right form, and allows a token of the vocabulary; nobody looks at it again. A
    source that answers with the same one for many rows, or steps, has it sent once.
    """

    bits: BitArray | None
    sound: bool = False

    def done(self) -> bool:
        """It is."""
        return True

    def result(self) -> BitArray | None:
        """The mask."""
        return self.bits


def num_words(vocab_size: int) -> int:
    """Words of a mask."""
    return -(-vocab_size // WORD)


def bits_of(token_ids: IntArray | Sequence[int], vocab_size: int) -> BitArray:
    """The mask that allows these tokens, all of the vocabulary: uint32 [ceil(vocab_size / 32)]."""
    allowed = np.zeros(num_words(vocab_size) * WORD, np.uint8)
    allowed[np.asarray(token_ids, np.int64)] = 1
    bits: BitArray = np.packbits(allowed, bitorder="little").view("<u4")
    return bits


def banned_ids(request: Request, num_output: int) -> list[int]:
    """Tokens that cannot be drawn as output token `num_output`, whatever a mask says: those with a
    bias of -inf, and stop tokens before `min_new_tokens`. Each at least once."""
    sampling = request.sampling
    found = [token for token, bias in sampling.logit_bias.items() if bias == -np.inf]
    if num_output < sampling.min_new_tokens:
        found += request.stop_ids
    return found
