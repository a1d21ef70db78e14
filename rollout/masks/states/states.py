"""The states that outputs of one grammar have been in, and the mask of each.

What may come next is the same for all outputs in a state, whatever rows and requests they are of,
so that a mask is computed once a state. Which states a token leads to is found out once too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from engine.protocol import BitArray
from rollout.masks.base import KnownMask, bits_of
from rollout.masks.states.json_text import JsonState

_MOST_STATES = 16_384
_MOST_BYTES = 8 << 20
_PLAIN = bytes(set(range(0x20, 0x7F)) - set(b'"\\'))
"""Characters of one byte that stand for themselves in a JSON string."""


class TextReader(Protocol):
    """Says which beginnings of texts may go on alike: those of one state."""

    @property
    def start(self) -> Hashable:
        """The state of the empty text."""
        ...

    def after(self, state: Hashable, token: int) -> Hashable | None:
        """The state behind one token more, which may come there; None where it is not known."""
        ...

    def mask_key(self, state: Hashable) -> Hashable:
        """What states with the same mask have in common; others may not have it."""
        ...


class _Before(NamedTuple):
    """The constraint has not begun. last: tokens that came last, as many as it begins behind."""

    last: tuple[int, ...]


class Shared:
    """The mask of all states of one `mask_key`; None until it was computed."""

    __slots__ = ("mask",)

    def __init__(self, mask: KnownMask | None = None) -> None:
        self.mask = mask


class State:
    """A `Course`.

    key: what is known of the output. shared: what may come next. steps: states behind tokens, by
    id; behind so many plain characters of a string, by their number below 0.
    """

    __slots__ = ("_owner", "counts", "key", "shared", "steps")

    def __init__(self, owner: States, key: Hashable, shared: Shared) -> None:
        self._owner = owner
        self.key = key
        self.shared = shared
        self.steps: dict[int, State] = {}
        self.counts = isinstance(key, JsonState) and key.texts is not None

    @property
    def mask(self) -> KnownMask | None:
        """What may come next; None until it was computed."""
        return self.shared.mask

    def after(self, token: int) -> State:
        """The state behind one token more, which the mask allows."""
        step = self._owner.step_of(token) if self.counts else token
        found = self.steps.get(step)
        return self._owner.read(self, step, token) if found is None else found


class States:
    """Of one grammar, and one set of tokens that end its outputs. From two threads: what both find
    out at once is found out twice, and is the same."""

    def __init__(
        self,
        reader: TextReader,
        tokens: Sequence[bytes],
        *,
        ending_ids: Iterable[int],
        after_ids: Iterable[int],
    ) -> None:
        """tokens: bytes of each token by id. after_ids: what the constraint begins behind."""
        self._reader = reader
        self._tokens = tokens
        self._ending_ids = frozenset(ending_ids)
        self._after_ids = tuple(after_ids)
        self._steps: dict[int, int] = {}
        self._inside = bits_of(range(len(tokens)), len(tokens))
        ends = bits_of(np.array(sorted(self._ending_ids), np.int64), len(tokens))
        self._before = Shared(self._sound(self._inside & ~ends))
        self._over = State(self, "over", Shared(self._sound(ends)))
        self._lost = State(self, None, Shared())
        self._empty()

    def walk(self, output_ids: Iterable[int]) -> State:
        """The state of an output that the grammar allows."""
        state = self._start
        for token in output_ids:
            state = state.after(token)
        return state

    def learn(self, state: State, bits: BitArray) -> None:
        """The mask of a state was computed: uint32 [words], of which those of the vocabulary count.
        It is copied."""
        own = bits[: len(self._inside)]
        if state is self._lost or state.mask is not None or not (own & self._inside).any():
            return
        content = own.tobytes()
        found = self._masks.get(content)
        if found is None:
            if len(content) * len(self._masks) > _MOST_BYTES:
                self._empty()
            found = KnownMask(np.frombuffer(content, np.uint32), sound=True)
            self._masks[content] = found
        state.shared.mask = found

    def step_of(self, token: int) -> int:
        """What decides where a token leads inside a string: the number of its characters, below 0,
        where they stand for themselves; else itself."""
        found = self._steps.get(token)
        if found is None:
            plain = 0 if token in self._ending_ids else _num_plain(self._tokens[token])
            found = self._steps[token] = -plain if plain else token
        return found

    def read(self, state: State, step: int, token: int) -> State:
        """The state behind `token`, where no output has been yet."""
        if state is self._lost or state is self._over:
            return state
        found = state.steps[step] = self._read(state.key, step, token)
        return found

    def _read(self, key: Hashable, step: int, token: int) -> State:
        if isinstance(key, _Before):
            last = (*key.last, token)[-len(self._after_ids) :]
            return self._at(self._reader.start if last == self._after_ids else _Before(last))
        if token in self._ending_ids:
            return self._over
        if step < 0 and isinstance(key, JsonState):
            return self._at(key.longer(-step))
        after = self._reader.after(key, token)
        return self._lost if after is None else self._at(after)

    def _at(self, key: Hashable) -> State:
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= _MOST_STATES:
                self._empty()
            found = self._found.setdefault(key, State(self, key, self._shared_by(key)))
        return found

    def _shared_by(self, key: Hashable) -> Shared:
        if isinstance(key, _Before):
            return self._before
        return self._shared.setdefault(self._reader.mask_key(key), Shared())

    def _empty(self) -> None:
        """Forget all states. An output that is in one goes on from there."""
        self._found: dict[Hashable, State] = {}
        self._shared: dict[Hashable, Shared] = {}
        self._masks: dict[bytes, KnownMask] = {}
        self._start = self._at(_Before(()) if self._after_ids else self._reader.start)

    def _sound(self, bits: BitArray) -> KnownMask | None:
        return KnownMask(bits, sound=True) if (bits & self._inside).any() else None


def _num_plain(data: bytes) -> int:
    """Characters of a token that stands for itself in a JSON string; 0 of others."""
    if data.isascii():
        return 0 if data.translate(None, _PLAIN) else len(data)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return 0
    plain = not data.translate(None, _PLAIN + bytes(range(0x80, 0x100)))
    return len(text) if plain else 0
