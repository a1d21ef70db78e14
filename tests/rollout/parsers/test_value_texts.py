"""Values inside calls: JSON, Python's literals and bare texts between tags, piece by piece."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.parsers.json_text import json_kind, read_value
from rollout.parsers.python_text import python_json, read_literal
from rollout.parsers.schema_kinds import ALL_KINDS, argument_kinds
from rollout.parsers.source import NotACall, Sink, Source, Steps
from rollout.parsers.tagged_values import typed

Reader = Callable[[Source, Sink], Steps[None]]


def fed(reader: Reader, text: str) -> str | None:
    """What a reader makes of a text that comes by characters; None if it refuses it."""
    source, pieces = Source(), []
    steps = reader(source, pieces.append)
    try:
        for char in text:
            if next(steps, "over") == "over":
                break
            source.push(char)
        source.closed = True
        for _ in steps:
            pass
    except NotACall:
        return None
    return "".join(pieces)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(value=values, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_json_is_passed_on_as_it_is(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert fed(read_value, text) == text
    assert json_kind(f" {text}\n") is not None


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet='{}[]",:\\tu0123456789eE+-. nfalsr\n', max_size=12))
def test_what_is_json_is_what_the_standard_library_reads(text: str) -> None:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
        is_json = True
    except ValueError:
        is_json = False
    assert (json_kind(text) is not None) is is_json


@pytest.mark.parametrize(
    "text,kind",
    [
        ("{}", "object"),
        ("[1]", "array"),
        ('"a"', "string"),
        ("-12", "integer"),
        ("1.0", "number"),
        ("1e3", "number"),
        ("true", "boolean"),
        ("null", "null"),
        ("NaN", None),
        ("01", None),
        ("'a'", None),
        ("1 2", None),
        ("", None),
    ],
)
def test_the_kind_of_a_value(text: str, kind: str | None) -> None:
    assert json_kind(text) == kind


@settings(max_examples=150, deadline=None)
@given(value=values)
def test_a_literal_of_python_says_the_same_as_json(value: Any) -> None:
    text = repr(value)
    expected = json.loads(json.dumps(value))
    for found in (python_json(text), fed(read_literal, text)):
        assert found is not None
        assert json.loads(found) == expected


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="abfnrtvxuU0123457'\"\\N{}\n", max_size=10))
def test_strings_are_read_as_python_reads_them(text: str) -> None:
    quoted = f"'''{text}'''"
    try:
        expected = ast.literal_eval(quoted)
    except (SyntaxError, SyntaxWarning, ValueError):
        return
    if not isinstance(expected, str) or "\\N" in text:
        return
    found = python_json(quoted)
    # One literal beside another is one text to Python.
    if found is not None:
        assert json.loads(found) == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    "text,expected",
    [
        ("True", "true"),
        ("null", "null"),
        ("-1_000", "-1000"),
        ("0x1F", "31"),
        ("+5", "5"),
        (".5", "0.5"),
        ("5.", "5.0"),
        ("1" * 5000, "1" * 5000),
        ("[1, 'a', ]", '[1, "a"]'),
        ("{'a': {\"b\": [None]},}", '{"a": {"b": [null]}}'),
        ('""', '""'),
        ('"""a"b"""', '"a\\"b"'),
        (r"'\N{BULLET}\101\x41\u00e9\U0001F600\q'", '"•AA\\u00e9😀\\\\q"'),
        ("'a\nb'", '"a\\nb"'),
        ("(1, 2)", None),
        ("{1}", None),
        ("{1: 2}", None),
        ("f(x)", None),
        ("1j", None),
        ("inf", None),
        ("1e999", "1e999"),
        ("'a", None),
        ("[1", None),
        ("[1 2]", None),
        (r"'\U00110000'", None),
        (r"'\xg1'", None),
        (r"'\N{NOBODY}'", None),
        ("0x" + "f" * 5000, None),
        ("x", None),
        ("", None),
    ],
)
def test_literals(text: str, expected: str | None) -> None:
    assert python_json(text) == expected
    if expected is not None:
        assert fed(read_literal, text) == expected


def test_depth_costs_no_stack() -> None:
    deep = "[" * 50_000 + "]" * 50_000
    assert json_kind(deep) == "array"
    assert python_json(deep) == deep


SCHEMA: dict[str, Any] = {
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "both": {"allOf": [{"type": ["string", "null"]}, {"type": ["null", "array"]}]},
        "word": {"enum": ["a", "b"]},
        "fixed": {"const": 1.5},
        "named": {"$ref": "#/$defs/Size"},
        "loop": {"$ref": "#/$defs/Loop"},
        "lost": {"$ref": "#/$defs/Nothing"},
        "free": {},
        "odd": {"type": 5},
    },
    "additionalProperties": {"type": "boolean"},
    "$defs": {"Size": {"type": "number"}, "Loop": {"$ref": "#/$defs/Loop"}},
}


@pytest.mark.parametrize(
    "key,kinds",
    [
        ("text", {"string"}),
        ("count", {"integer"}),
        ("either", {"string", "null"}),
        ("both", {"null"}),
        ("word", {"string"}),
        ("fixed", {"number"}),
        ("named", {"number"}),
        ("loop", ALL_KINDS),
        ("lost", ALL_KINDS),
        ("free", ALL_KINDS),
        ("odd", ALL_KINDS),
        ("other", {"boolean"}),
    ],
)
def test_which_types_a_schema_lets_an_argument_have(key: str, kinds: set[str]) -> None:
    assert argument_kinds(SCHEMA, key) == kinds


def test_schemas_that_name_each_other_are_looked_at_once() -> None:
    """Every one names the next ten times, the last ones the first."""
    definitions = {
        f"d{at}": {"anyOf": [{"$ref": f"#/$defs/d{(at + step) % 200}"} for step in range(1, 11)]}
        for at in range(200)
    }
    schema = {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": definitions}
    assert argument_kinds(schema, "a") == ALL_KINDS
    chain = {f"d{at}": {"$ref": f"#/$defs/d{at + 1}"} for at in range(5000)}
    assert argument_kinds({**schema, "$defs": chain}, "a") == ALL_KINDS


@pytest.mark.parametrize(
    "text,kinds,expected",
    [
        ("5", {"integer"}, "5"),
        ("5", {"number"}, "5"),
        ("5", {"string", "integer"}, "5"),
        ("5", ALL_KINDS, "5"),
        ("5", {"string", "null"}, '"5"'),
        (" [1] ", {"array"}, "[1]"),
        ("['a']", {"array"}, '["a"]'),
        ("['a']", ALL_KINDS, "\"['a']\""),
        ("True", {"boolean"}, "true"),
        ("None", {"string", "null"}, "null"),
        ('"a"', ALL_KINDS, '"\\"a\\""'),
        ("five", {"integer"}, '"five"'),
        (" a\n", ALL_KINDS, '" a\\n"'),
        ("{}", {"integer"}, "{}"),
        ("", {"object"}, '""'),
    ],
)
def test_the_type_of_a_bare_text(text: str, kinds: set[str], expected: str) -> None:
    assert typed(text, frozenset(kinds)) == expected
