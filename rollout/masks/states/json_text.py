"""Where the beginning of a JSON text stands in its schema.

A state holds what decides how the text may go on: the objects and lists that are open, and of what
has begun in them as much as matters. Texts in one state may be completed by the same characters, so
they have one mask. What is told apart needlessly (two spellings of one pattern's text) only costs a
mask more.

The language is that of `languages.json_schema`: values may have whitespace between their parts, as
many characters at a time as are allowed there; names come in the schema's order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from rollout.masks.grammar.languages.json_schema import MOST_WHITESPACE
from rollout.masks.states.integers import Numbers
from rollout.masks.states.schema_places import Items, Members, Place, Texts
from rollout.masks.states.token_lengths import TokenLengths

_SPACE = frozenset(b" \t\n\r")
_NUMERIC = frozenset(b"0123456789+-.eE")
_SHORT_ESCAPES = frozenset(b'"\\/bfnrt')
_BETWEEN = frozenset({"value", "first", "open", "comma", "colon", "behind"})
_WORDS = (b"true", b"false", b"null")
_BEGIN_ALIKE = {
    **dict.fromkeys(range(0xC2, 0xE0), b"\xc2"),
    **dict.fromkeys([*range(0xE1, 0xED), 0xEE, 0xEF], b"\xe1"),
    **dict.fromkeys(range(0xF1, 0xF4), b"\xf1"),
}
"""First bytes of UTF-8 (RFC 3629, section 4) behind which the same may come, by one of them."""
_LEFT = {0xC: b"", 0xE: b"\xc2", 0xF: b"\xe1"}
"""What is left of a character behind its second byte, as another that has begun, by the first."""
_OTHER_NAME = -1
_LONGEST_NAME = 256
_DEEPEST = 64
_LONGEST_TEXT = 64


class Frame(NamedTuple):
    """An open object or list. at: the number of its last name, `_OTHER_NAME` of one that the schema
    does not have; the index of its value."""

    of: Members | Items
    at: int


Mode = tuple[Any, ...]
"""Its name, and what it needs to know. Between the parts of a value: how much whitespace came."""


class JsonState(NamedTuple):
    """open: from the outermost on. mode: what the text is in."""

    open: tuple[Frame, ...]
    mode: Mode

    @property
    def texts(self) -> Texts | None:
        """What string this is in, between two of its characters; else None."""
        return self.mode[1] if self.mode[0] == "string" and not self.mode[3] else None

    def longer(self, num_chars: int) -> JsonState:
        """Of a string: with so many plain characters more."""
        name, texts, count, _ = self.mode
        return JsonState(self.open, (name, texts, texts.counted(count + num_chars), b""))


class JsonText:
    """Reads texts of one schema."""

    def __init__(self, schema: Any, tokens: Sequence[bytes], lengths: TokenLengths) -> None:
        """schema: as `served_schema` gave it. tokens: bytes of each token by id."""
        self.start = JsonState((), ("value", Place(schema, schema), 0))
        self._tokens = tokens
        self._lengths = lengths

    def after(self, state: Hashable, token: int) -> JsonState | None:
        """The state behind one token more; None where it is not known."""
        found: JsonState | None = state if isinstance(state, JsonState) else None
        for char in self._tokens[token]:
            if found is None:
                return None
            found = _STEPS[found.mode[0]](found.open, found.mode, char)
        return found

    def mask_key(self, state: Hashable) -> Hashable:
        """What is the same of states with the same mask: not how long a string or whitespace is,
        but which tokens fit into what is left of it."""
        if not isinstance(state, JsonState):
            return state
        mode, fitting = state.mode, self._lengths.fitting_chars
        if state.texts is not None:
            least, most, count = state.texts.least, state.texts.most, mode[2]
            room = None if most is None else fitting(most - count)
            return (*state.open, "string", room, fitting(least - count))
        if mode[0] in _BETWEEN and 0 < mode[-1] <= MOST_WHITESPACE:
            room = self._lengths.fitting_spaces(MOST_WHITESPACE - mode[-1])
            return (*state.open, *mode[:-1], "space", room)
        return state


def _between(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """One more character of whitespace, if it is one."""
    if char in _SPACE:
        return JsonState(opened, (*mode[:-1], mode[-1] + 1))
    return None


def _value(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """Before a value; in the mode "first" its list may end instead."""
    place = mode[1]
    if char in _SPACE:
        return _between(opened, mode, char)
    if char == ord("]"):
        return _done(opened[:-1]) if mode[0] == "first" else None
    if place is None:
        return None
    if char == ord('"') and place.strings is not None:
        return JsonState(opened, ("string", place.strings, 0, b""))
    if len(opened) >= _DEEPEST:
        return None
    if char == ord("{") and place.objects is not None:
        return JsonState((*opened, Frame(place.objects, _OTHER_NAME - 1)), ("open", 0))
    if char == ord("[") and place.arrays is not None:
        items = place.arrays
        return JsonState((*opened, Frame(items, 0)), ("first", items.of(0), 0))
    if char in _NUMERIC:
        return _number(opened, ("number", place.numbers, None), char)
    if char in b"tfn":
        return JsonState(opened, ("word", bytes([char])))
    if char in b'"{[':
        return _literal(opened, ("literal", b"", 0, False, False), char)
    return None


def _string(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """In a string whose length alone matters. Of an escape, or a character of several bytes, what
    has to come until it is whole is kept as the byte that it might have begun with."""
    name, texts, count, part = mode
    whole = (name, texts, texts.counted(count + 1), b"")
    if part == b"\\":
        # Escapes by number are left alone: half a pair of them is no character.
        return JsonState(opened, whole) if char in _SHORT_ESCAPES else None
    if part:
        left = _LEFT[part[0] >> 4]
        return JsonState(opened, (name, texts, count, left) if left else whole)
    if char == ord('"'):
        return _done(opened)
    if char == ord("\\") or char >= 0x80:
        first = _BEGIN_ALIKE.get(char, bytes([char]))
        return JsonState(opened, (name, texts, count, first)) if char < 0xF5 else None
    return JsonState(opened, whole)


def _number(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """In a number, which ends with the first character that is of none."""
    name, numbers, state = mode
    if char not in _NUMERIC:
        return _behind(opened, ("behind", 0), char)
    if numbers is None:
        return JsonState(opened, (name, None, _shortened((state or b"") + bytes([char]))))
    new = _of_number(numbers, state, char)
    return None if new is None else JsonState(opened, (name, numbers, new))


def _of_number(numbers: Numbers, state: Hashable | None, char: int) -> Hashable | None:
    return numbers.begin(char) if state is None else numbers.after(state, char)


def _word(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """In true, false or null."""
    text = mode[1] + bytes([char])
    if text in _WORDS:
        return _done(opened)
    return JsonState(opened, ("word", text))


def _literal(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """In a value of which every character may matter."""
    _, text, depth, quoted, escaped = mode
    text += bytes([char])
    if quoted:
        quoted = escaped or char != ord('"')
        escaped = char == ord("\\") and not escaped
    elif char == ord('"'):
        quoted = True
    elif char in b"{[":
        depth += 1
    elif char in b"}]":
        depth -= 1
    if depth == 0 and not quoted:
        return _done(opened)
    return JsonState(opened, ("literal", _shortened(text), depth, quoted, escaped))


def _before_name(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """Behind the brace or the comma before a name; in the mode "open" the object may end."""
    if char == ord('"'):
        return JsonState(opened, ("name", b'"', False))
    if char == ord("}") and mode[0] == "open":
        return _done(opened[:-1])
    return _between(opened, mode, char)


def _name(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """In a name."""
    _, text, escaped = mode
    text += bytes([char])
    if len(text) > _LONGEST_NAME:
        return None
    if escaped or char != ord('"'):
        return JsonState(opened, ("name", text, char == ord("\\") and not escaped))
    members = opened[-1].of
    assert isinstance(members, Members)
    try:
        name = json.loads(text)
    except ValueError:
        return None
    at, place = members.named.get(name, (_OTHER_NAME, members.others))
    return JsonState((*opened[:-1], Frame(members, at)), ("colon", place, 0))


def _colon(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """Behind a name."""
    if char == ord(":"):
        return JsonState(opened, ("value", mode[1], 0))
    return _between(opened, mode, char)


def _behind(opened: tuple[Frame, ...], mode: Mode, char: int) -> JsonState | None:
    """Behind a value."""
    if not opened or char in _SPACE:
        return _between(opened, mode, char)
    frame = opened[-1]
    if char == ord(",") and isinstance(frame.of, Members):
        return JsonState(opened, ("comma", 0))
    if char == ord(",") and isinstance(frame.of, Items):
        index = frame.of.behind(frame.at)
        moved = (*opened[:-1], Frame(frame.of, index))
        return JsonState(moved, ("value", frame.of.of(index), 0))
    closing = ord("}") if isinstance(frame.of, Members) else ord("]")
    return _done(opened[:-1]) if char == closing else None


def _done(opened: tuple[Frame, ...]) -> JsonState:
    """A value is whole."""
    return JsonState(opened, ("behind", 0))


def _shortened(text: bytes) -> bytes:
    """What stands for a text, and for no other: so that states of long ones stay small."""
    if len(text) <= _LONGEST_TEXT:
        return text
    # No value has a zero byte.
    return b"\0" + hashlib.blake2b(text, digest_size=16).digest()


_STEPS = {
    "value": _value,
    "first": _value,
    "string": _string,
    "number": _number,
    "word": _word,
    "literal": _literal,
    "open": _before_name,
    "comma": _before_name,
    "name": _name,
    "colon": _colon,
    "behind": _behind,
}
