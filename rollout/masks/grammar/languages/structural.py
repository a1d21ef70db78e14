"""Structural tags: free text with parts of a fixed form, as rules of llguidance's Lark dialect.

Two forms are read: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, SGLang's, and
xgrammar's `{"format": ...}`, of which the first is the case `triggered_tags`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from rollout.masks.grammar.languages.bounds import MAX_TAGS, refuse
from rollout.masks.grammar.languages.gbnf_rules import EMPTY, gbnf_rules
from rollout.masks.grammar.languages.json_schema import read_json, served_schema
from rollout.masks.grammar.languages.regex import literal, regex_terminal

ANY = "/(?s:.)*/"

Object = dict[str, Any]


def structural_rules(source: str, special: Mapping[str, int]) -> list[str]:
    """The rules of a structural tag, as lines that begin with `start`.

    special: ids of special tokens by their text; where a text of the tag holds one, that token has
    to come. Raises InvalidRequest naming the place, as a JSON Pointer.
    """
    given = read_json(source, "the structural tag")
    if not isinstance(given, dict):
        refuse("the structural tag is no object")
    if given.get("type", "structural_tag") != "structural_tag":
        _wrong("#/type", f"is {given['type']!r}; give 'structural_tag'")
    writer = _Writer(special)
    if "format" in given:
        _known(given, "#", ("type", "format"))
        body = writer.format(given["format"], "#/format")
    else:
        _known(given, "#", ("type", "structures", "triggers"))
        tags = [
            _tag_of(structure, f"#/structures/{at}")
            for at, structure in enumerate(_list(given, "structures", "#"))
        ]
        body = writer.triggered(tags, _texts(given, "triggers", "#"), "#")
    return [f"start: {body}", *writer.lines]


def _tag_of(structure: Any, place: str) -> Object:
    """A structure as the tag that it is in the other form."""
    _check_object(structure, place)
    _known(structure, place, ("begin", "schema", "end"))
    schema = structure.get("schema", {})
    content = {"type": "json_schema", "json_schema": schema}
    return {"begin": structure.get("begin"), "content": content, "end": structure.get("end", "")}


class _Writer:
    """Writes expressions, and the rules that they need into `lines`."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self.lines: list[str] = []
        self._num_tags = 0

    def format(self, given: Any, place: str) -> str:
        """One format of xgrammar's form."""
        _check_object(given, place)
        kind = given.get("type")
        writers: Mapping[str, Callable[[Object, str], str]] = {
            "const_string": self._const,
            "json_schema": self._schema,
            "regex": self._regex,
            "grammar": self._grammar,
            "any_text": self._any,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self.tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }
        if kind not in writers:
            _wrong(f"{place}/type", f"is {kind!r}; served are {', '.join(writers)}")
        return writers[kind](given, place)

    def triggered(
        self,
        tags: Sequence[Any],
        triggers: Sequence[str],
        place: str,
        *,
        at_least_one: bool = False,
        stop_after_first: bool = False,
    ) -> str:
        """Free text until one of `triggers` comes, then one of `tags` that begin with it; again
        and again."""
        if not tags or not triggers or not all(triggers):
            _wrong(place, "needs tags, and triggers that are not empty")
        by_trigger: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for at, tag in enumerate(tags):
            where = f"{place}/tags/{at}"
            _check_object(tag, where)
            begin = _text(tag, "begin", where)
            found = [trigger for trigger in triggers if begin.startswith(trigger)]
            if not found:
                _wrong(f"{where}/begin", f"{begin!r} begins with none of the triggers")
            trigger = max(found, key=len)
            by_trigger[trigger].append(self._rest(tag, trigger, where))
        used = {trigger: bodies for trigger, bodies in by_trigger.items() if bodies}
        called = self._rule(
            " | ".join(
                f"{self._until(trigger)} ({' | '.join(bodies)})" for trigger, bodies in used.items()
            )
        )
        times = "" if stop_after_first and at_least_one else "?" if stop_after_first else "*"
        times = "+" if at_least_one and not stop_after_first else times
        end = "" if stop_after_first and at_least_one else f" {self._without(list(triggers))}"
        return f"(({called}){times}{end})"

    def tag(self, given: Object, place: str) -> str:
        """A tag from its begin to its end."""
        _known(given, place, ("type", "begin", "content", "end"))
        return self._rest(given, "", place)

    def _rest(self, tag: Object, trigger: str, place: str) -> str:
        """A tag behind the part of its begin that is there already."""
        self._num_tags += 1
        if self._num_tags > MAX_TAGS:
            _wrong(place, f"is one tag too many; the most is {MAX_TAGS}")
        begin = self._said(_text(tag, "begin", place)[len(trigger) :])
        content, end = tag.get("content"), tag.get("end", "")
        ends = [end] if isinstance(end, str) else end
        if not isinstance(ends, list) or not all(isinstance(one, str) for one in ends) or not ends:
            _wrong(f"{place}/end", "is no text, and no list of texts")
        if isinstance(content, dict) and content.get("type") == "any_text" and all(ends):
            closed = " | ".join(self._until(one) for one in ends)
            return f"({begin} ({closed}))"
        inner = self.format(content, f"{place}/content")
        return f"({begin} {inner} ({' | '.join(map(self._said, ends))}))"

    def _const(self, given: Object, place: str) -> str:
        _known(given, place, ("type", "value"))
        return self._said(_text(given, "value", place))

    def _schema(self, given: Object, place: str) -> str:
        _known(given, place, ("type", "json_schema"))
        schema = served_schema(given.get("json_schema"), f"{place}/json_schema")
        return self._rule(f"%json {json.dumps(schema)}")

    def _regex(self, given: Object, place: str) -> str:
        _known(given, place, ("type", "pattern"))
        return self._terminal(regex_terminal(_text(given, "pattern", place)))

    def _grammar(self, given: Object, place: str) -> str:
        _known(given, place, ("type", "grammar"))
        root, lines = gbnf_rules(_text(given, "grammar", place), f"g{len(self.lines)}x")
        self.lines += lines
        return root

    def _any(self, given: Object, place: str) -> str:
        _known(given, place, ("type",))
        return self._terminal(ANY)

    def _sequence(self, given: Object, place: str) -> str:
        _known(given, place, ("type", "elements"))
        return f"({' '.join(self._elements(given, place))})"

    def _or(self, given: Object, place: str) -> str:
        _known(given, place, ("type", "elements"))
        return f"({' | '.join(self._elements(given, place))})"

    def _elements(self, given: Object, place: str) -> list[str]:
        found = _list(given, "elements", place)
        if not found:
            _wrong(f"{place}/elements", "is empty")
        return [self.format(one, f"{place}/elements/{at}") for at, one in enumerate(found)]

    def _triggered(self, given: Object, place: str) -> str:
        known = ("type", "triggers", "tags", "at_least_one", "stop_after_first")
        _known(given, place, known)
        return self.triggered(
            _list(given, "tags", place),
            _texts(given, "triggers", place),
            place,
            at_least_one=bool(given.get("at_least_one")),
            stop_after_first=bool(given.get("stop_after_first")),
        )

    def _separated(self, given: Object, place: str) -> str:
        known = ("type", "tags", "separator", "at_least_one", "stop_after_first")
        _known(given, place, known)
        tags = _list(given, "tags", place)
        if not tags:
            _wrong(f"{place}/tags", "is empty")
        each = []
        for at, tag in enumerate(tags):
            _check_object(tag, f"{place}/tags/{at}")
            each.append(self.tag(tag, f"{place}/tags/{at}"))
        one = self._rule(" | ".join(each))
        separator = self._said(_text(given, "separator", place))
        many = one if given.get("stop_after_first") else f"{one} ({separator} {one})*"
        return f"({many})" if given.get("at_least_one") else f"({many})?"

    def _said(self, text: str) -> str:
        """A text that has to come, its special tokens as such."""
        if not text:
            return EMPTY
        names = [name for name in self._special if name and name in text]
        if not names:
            return literal(text)
        name = min(names, key=lambda found: (text.index(found), -len(found)))
        before, after = text.split(name, 1)
        parts = [self._said(part) for part in (before,) if part]
        parts.append(f"<[{self._special[name]}]>")
        parts += [self._said(part) for part in (after,) if part]
        return " ".join(parts)

    def _until(self, text: str) -> str:
        """Any text up to the first `text`, and that."""
        if self._has_special(text):
            return f"{self._terminal(ANY)} {self._said(text)}"
        name = f"until{len(self.lines)}"
        self.lines.append(f"{name}[lazy]: {self._terminal(ANY)} {literal(text)}")
        return name

    def _without(self, texts: list[str]) -> str:
        """Any text in which none of `texts` is."""
        plain = [literal(text) for text in texts if not self._has_special(text)]
        if not plain:
            return self._terminal(ANY)
        return self._terminal(f"{ANY} & ~(/(?s:.)*/ ({' | '.join(plain)}) /(?s:.)*/)")

    def _has_special(self, text: str) -> bool:
        """Whether a special token is part of it, which no free text has."""
        return any(name in text for name in self._special)

    def _rule(self, body: str) -> str:
        name = f"rule{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"T{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name


def _check_object(value: Any, place: str) -> None:
    if not isinstance(value, dict):
        _wrong(place, "is no object")


def _known(given: Object, place: str, names: tuple[str, ...]) -> None:
    for name in given:
        if name not in names:
            _wrong(f"{place}/{name}", f"is not served here; known are {', '.join(names)}")


def _list(given: Object, name: str, place: str) -> list[Any]:
    found = given.get(name)
    if not isinstance(found, list):
        _wrong(f"{place}/{name}", "is no list")
    return found


def _texts(given: Object, name: str, place: str) -> list[str]:
    found = _list(given, name, place)
    if not all(isinstance(text, str) for text in found):
        _wrong(f"{place}/{name}", "is no list of texts")
    return found


def _text(given: Object, name: str, place: str) -> str:
    found = given.get(name)
    if not isinstance(found, str):
        _wrong(f"{place}/{name}", "is no text")
    return found


def _wrong(place: str, problem: str) -> NoReturn:
    refuse(f"{place} {problem}")
