"""Grammars written as `name ::= ...`, in the form of llama.cpp's GBNF, read into nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from rollout.masks.grammar.languages.bounds import MAX_DEPTH, refuse
from rollout.masks.grammar.languages.regex import literal

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
    |(?P<define>::=)
    |(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)
    |(?P<literal>"(?:[^"\\\n]|\\.)*")
    |(?P<class>\[\^?(?:[^\]\\\n]|\\.)*\])
    |(?P<times>[*+?]|\{[ ]*[0-9]+[ ]*(?:,[ ]*[0-9]*[ ]*)?\})
    |(?P<bar>\|)|(?P<open>\()|(?P<close>\))|(?P<any>\.)""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|(.)", re.S)
_PLAIN = {"n": "\n", "r": "\r", "t": "\t"}
_ITSELF = frozenset("\"'\\[]-^/")


@dataclass(frozen=True)
class Text:
    """Something that no rule is needed for, as Lark writes it: a literal or a class."""

    lark: str


@dataclass(frozen=True)
class Name:
    """The rule of that name."""

    name: str


@dataclass(frozen=True)
class Sequence:
    """One after the other; the empty text where there are none."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of them."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeated:
    """times: `*`, `+`, `?` or `{...}`."""

    part: Node
    times: str


Node = Text | Name | Sequence | Choice | Repeated


def read_gbnf(source: str) -> dict[str, Node]:
    """The rules by name, in their order; there is one called `root`, and every name has its rule.

    Raises InvalidRequest with line and column of what is no such grammar.
    """
    return _Reader(source).rules()


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class _Reader:
    def __init__(self, source: str) -> None:
        self._source = source
        self._tokens = list(self._scan())
        self._at = 0
        self._used: list[_Token] = []

    def rules(self) -> dict[str, Node]:
        """Read to the end. A rule ends where the next is defined."""
        found: dict[str, Node] = {}
        while self._at < len(self._tokens):
            name = self._tokens[self._at]
            if not self._defines():
                self._wrong(name.at, "a rule 'name ::= ...' should begin")
            if name.text in found:
                self._wrong(name.at, f"the rule {name.text!r} is there twice")
            self._at += 2
            found[name.text] = self._choice(0)
            if (left := self._peek()) is not None:
                self._wrong(left.at, f"{left.text!r} has no place here")
        if "root" not in found:
            refuse("there is no rule 'root', where it would begin")
        for token in self._used:
            if token.text not in found:
                self._wrong(token.at, f"there is no rule {token.text!r}")
        return found

    def _scan(self) -> Iterator[_Token]:
        at = 0
        while at < len(self._source):
            found = _TOKEN.match(self._source, at)
            if found is None:
                self._wrong(at, f"{self._source[at]!r} begins nothing that a rule may hold")
            kind = found.lastgroup or ""
            if kind != "space":
                yield _Token(kind, found[0], at)
            at = found.end()

    def _defines(self) -> bool:
        pair = [token.kind for token in self._tokens[self._at : self._at + 2]]
        return pair == ["name", "define"]

    def _peek(self) -> _Token | None:
        """The next token of this rule."""
        if self._at >= len(self._tokens) or self._defines():
            return None
        return self._tokens[self._at]

    def _choice(self, depth: int) -> Node:
        parts = [self._sequence(depth)]
        while (token := self._peek()) is not None and token.kind == "bar":
            self._at += 1
            parts.append(self._sequence(depth))
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while (token := self._peek()) is not None and token.kind not in ("bar", "close"):
            self._at += 1
            part = self._part(token, depth)
            after = self._peek()
            if after is not None and after.kind == "times":
                self._at += 1
                part = Repeated(part, after.text.replace(" ", ""))
            parts.append(part)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _part(self, token: _Token, depth: int) -> Node:
        match token.kind:
            case "name":
                self._used.append(token)
                return Name(token.text)
            case "literal":
                items = self._characters(token, 1)
                return Text(literal("".join(char for char, _ in items)))
            case "class":
                return Text(self._class(token))
            case "any":
                return Text("/(?s:.)/")
            case "open":
                return self._group(token, depth + 1)
            case _:
                what = "repeats nothing" if token.kind == "times" else "has no place here"
                self._wrong(token.at, f"{token.text!r} {what}")

    def _group(self, opened: _Token, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self._wrong(opened.at, f"groups are more than {MAX_DEPTH} deep")
        found = self._choice(depth)
        closed = self._peek()
        if closed is None or closed.kind != "close":
            self._wrong(opened.at, "'(' is not closed")
        self._at += 1
        return found

    def _class(self, token: _Token) -> str:
        negated = token.text.startswith("[^")
        items = self._characters(token, 2 if negated else 1)
        if not items:
            self._wrong(token.at, "a class of no characters matches nothing")
        inside = range(1, len(items) - 1)
        parts = [
            "-" if plain and char == "-" and at in inside else f"\\x{{{ord(char):x}}}"
            for at, (char, plain) in enumerate(items)
        ]
        return f"/[{'^' if negated else ''}{''.join(parts)}]/"

    def _characters(self, token: _Token, begin: int) -> list[tuple[str, bool]]:
        """The characters between the quotes or brackets of a token, each with whether it is
        written as itself."""
        found = []
        for match in _ESCAPE.finditer(token.text, begin, len(token.text) - 1):
            code, escaped, plain = match[1] or match[2] or match[3], match[4], match[5]
            if code is not None:
                if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
                    self._wrong(token.at + match.start(), f"{match[0]} is no character")
                found.append((chr(int(code, 16)), False))
            elif plain is not None:
                found.append((plain, True))
            elif escaped in _PLAIN or escaped in _ITSELF:
                found.append((_PLAIN.get(escaped, escaped), False))
            else:
                self._wrong(token.at + match.start(), f"{match[0]} is no escape")
        return found

    def _wrong(self, at: int, problem: str) -> NoReturn:
        source = self._source
        line, start = source.count("\n", 0, at) + 1, source.rfind("\n", 0, at) + 1
        refuse(f"line {line}, column {at - start + 1}: {problem}")
