"""Rules of GBNF as those of llguidance's Lark dialect.

What refers to no rule that leads back to itself is regular. It becomes a terminal, one regular
expression that is followed exactly; of other rules the largest regular parts do. Between terminals
of a rule llguidance takes as much text for each as it can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from rollout.masks.grammar.languages.gbnf import (
    Choice,
    Name,
    Node,
    Repeated,
    Sequence,
    Text,
    read_gbnf,
)

EMPTY = '""'


def gbnf_rules(source: str, prefix: str) -> tuple[str, list[str]]:
    """The name of the root, and the rules as lines of Lark. Every name begins with `prefix`, which
    is in lower case. Raises InvalidRequest as `read_gbnf` does."""
    writer = _Writer(read_gbnf(source), prefix)
    return writer.root, writer.lines()


class _Writer:
    def __init__(self, rules: Mapping[str, Node], prefix: str) -> None:
        self._rules = rules
        self._prefix = prefix
        self._regular = _regular(rules)
        self._names = {
            name: self._named(f"{prefix}{number}", name in self._regular)
            for number, name in enumerate(rules)
        }
        self._terminals: dict[str, str] = {}
        self.root = self._names["root"]

    def lines(self) -> list[str]:
        """Every rule, and the terminals that parts of them became."""
        lines = [
            f"{self._names[name]}: "
            + (self._text(node) if name in self._regular else self._rule(node))
            for name, node in self._rules.items()
        ]
        return lines + [f"{name}: {text}" for text, name in self._terminals.items()]

    def _named(self, name: str, terminal: bool) -> str:
        return name.upper() if terminal else name

    def _is_regular(self, node: Node) -> bool:
        return all(name in self._regular for name in _names(node))

    def _text(self, node: Node) -> str:
        """A node as Lark writes it, within a terminal."""
        match node:
            case Text():
                return node.lark
            case Name(name):
                return self._names[name]
            case Sequence(parts):
                return f"({' '.join(map(self._text, parts))})" if parts else EMPTY
            case Choice(parts):
                return f"({' | '.join(map(self._text, parts))})"
            case Repeated():
                return f"({self._text(node.part)}){node.times}"

    def _rule(self, node: Node) -> str:
        """A node as Lark writes it, within a rule."""
        if self._is_regular(node):
            return self._terminal(node)
        match node:
            case Sequence(parts):
                return f"({' '.join(self._merged(parts, Sequence))})"
            case Choice(parts):
                return f"({' | '.join(self._merged(parts, Choice))})"
            case Repeated():
                return f"({self._rule(node.part)}){node.times}"
            case _:
                return self._text(node)

    def _merged(
        self, parts: tuple[Node, ...], kind: type[Sequence] | type[Choice]
    ) -> Iterator[str]:
        """The parts, those that are regular and stand beside each other as one."""
        for regular, some in groupby(parts, self._is_regular):
            group = tuple(some)
            if regular:
                yield self._terminal(group[0] if len(group) == 1 else kind(group))
            else:
                yield from map(self._rule, group)

    def _terminal(self, node: Node) -> str:
        """The name of the terminal that a regular part of a rule becomes."""
        if isinstance(node, Name):
            return self._names[node.name]
        text = self._text(node)
        number = len(self._terminals)
        return self._terminals.setdefault(text, f"{self._prefix}t{number}".upper())


def _names(node: Node) -> Iterator[str]:
    match node:
        case Name(name):
            yield name
        case Sequence(parts) | Choice(parts):
            for part in parts:
                yield from _names(part)
        case Repeated():
            yield from _names(node.part)


def _regular(rules: Mapping[str, Node]) -> set[str]:
    """Rules that lead to no rule that leads back to itself."""
    waits = {name: set(_names(node)) for name, node in rules.items()}
    users: dict[str, set[str]] = {name: set() for name in rules}
    for name, used in waits.items():
        for other in used:
            users[other].add(name)
    found: set[str] = set()
    free = [name for name, used in waits.items() if not used]
    while free:
        name = free.pop()
        found.add(name)
        for user in users[name]:
            waits[user].discard(name)
            if not waits[user]:
                free.append(user)
    return found
