"""JSON Schemas: which texts fit, and what is refused, by the place in the schema."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.protocol import Grammar
from rollout.masks.grammar.languages.bounds import MAX_DEPTH
from tests.helpers.grammars import accepts, begins, compiled, schema_grammar
from tests.helpers.schemas import is_valid, random_schema

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "text,fits",
    [
        ('{"name":"ab","age":7}', True),
        ('{"name": "ab", "age": 7, "tags": ["a"]}', True),
        ('{\n  "name": "ab",\n  "age": 150\n}', True),
        ('{"name":"ab","age":151}', False),
        ('{"name":"abcdef","age":1}', False),
        ('{"name":"ab"}', False),
        ('{"name":"ab","age":7,"x":1}', False),
        ('{"name":"ab","age":7,"tags":["c"]}', False),
        ('{"name":"ab","age":7,"tags":["a","b","a"]}', False),
        (' {"name":"ab","age":7}', False),
        ('{"name":"ab","age":7} ', False),
        ("{" + 65 * " " + '"name":"ab","age":7}', False),
    ],
)
def test_a_text_fits_or_not(text: str, fits: bool) -> None:
    assert accepts(schema_grammar(PERSON), text) == fits


def test_any_object_is_an_object() -> None:
    anything = Grammar(kind="json_object", source="")
    assert accepts(anything, '{"a": [1, {"b": null}], "c": "é"}')
    assert accepts(anything, "{}")
    assert not accepts(anything, "[]") and not begins(anything, '"')


def test_true_and_the_empty_schema_are_any_value() -> None:
    for schema in (True, {}, {"description": "x", "deprecated": True}):
        for text in ("1", '"a"', "[]", "{}", "null", "true"):
            assert accepts(schema_grammar(schema), text)


def test_values_of_random_schemas_are_those_that_a_validator_takes() -> None:
    """Texts of random walks through a grammar; the walk prefers what ends."""
    rng = random.Random(5)
    for _ in range(25):
        schema = random_schema(rng)
        text = walk(schema_grammar(schema), rng)
        assert is_valid(schema, text), (schema, text)


def walk(grammar: Grammar, rng: random.Random) -> str:
    """A text of the grammar, one byte after the other."""
    import numpy as np
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    from tests.helpers.grammars import tiny_vocabulary

    matcher, vocabulary = compiled(grammar).deep_copy(), tiny_vocabulary()
    bits, found = allocate_token_bitmask(1, vocabulary.end_id + 1), b""
    for _ in range(3000):
        fill_next_token_bitmask(matcher, bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        tokens = [token for token in allowed.tolist() if token <= vocabulary.end_id]
        assert tokens and all(token not in vocabulary.special_ids for token in tokens), (
            "nothing, or a special token, may come"
        )
        if vocabulary.end_id in tokens and (len(tokens) == 1 or rng.random() < 0.5):
            return found.decode()
        token = rng.choice([token for token in tokens if token != vocabulary.end_id])
        assert matcher.consume_token(token)
        found += vocabulary.tokens[token]
    raise AssertionError("no end")


REFUSED: list[tuple[Any, str, str]] = [
    ({"not": {"type": "string"}}, "#/not", "'not'"),
    ({"properties": {"a": {"contains": {}}}}, "#/properties/a/contains", "'contains'"),
    ({"items": [{"if": True}]}, "#/items/0/if", "'if'"),
    ({"$defs": {"a/b": {"propertyNames": {"maxLength": 1}}}}, "#/$defs/a~1b/propertyNames", ""),
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems", "'uniqueItems'"),
    ({"x-guidance": {"lenient": True}}, "#/x-guidance", "'x-guidance'"),
    ({"type": "strin"}, "#/type", "strin"),
    ({"anyOf": {}}, "#/anyOf", "list"),
    ({"anyOf": [{"type": "string"}, 3]}, "#/anyOf/1", "3"),
    ({"properties": {"a": 1}}, "#/properties/a", "1"),
    ({"type": "string", "format": "path"}, "#/format", "path"),
    ({"$ref": "https://example.com/x"}, "#/$ref", "example"),
    ({"$ref": "#/$defs/missing"}, "#", "missing"),
    ({"enum": []}, "#/enum", "empty"),
    ({"type": "string", "minLength": -1}, "#/minLength", "-1"),
    ({"type": "number", "minimum": "x"}, "#/minimum", "x"),
    ({"required": [1]}, "#/required/0", "1"),
    ({"properties": {"a": {"type": "string", "pattern": "("}}}, "#/properties/a", ""),
    ({"properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, "#/properties/a", ""),
    (
        {"properties": {"a": {"oneOf": [{"minimum": 1}, {"maximum": 3}]}}},
        "#/properties/a",
        "oneOf",
    ),
    ({"type": "object", "minProperties": 2}, "#/minProperties", "more than 1"),
    ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "#", "maxProperties"),
    ({"items": {"multipleOf": 0}}, "#/items/multipleOf", "above 0"),
    ({"items": {"multipleOf": -0.5}}, "#/items/multipleOf", "above 0"),
    (False, "#", ""),
    ([], "#", "object"),
    ("text", "#", "object"),
]


@pytest.mark.parametrize("schema,place,said", REFUSED, ids=[place for _, place, _ in REFUSED])
def test_what_is_not_served_is_refused_by_its_place(schema: Any, place: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiled(schema_grammar(schema))
    assert caught.value.field == "grammar"
    assert f"{place}" in caught.value.message and said in caught.value.message, caught.value


def test_what_asks_for_nothing_is_no_keyword() -> None:
    schema = {"type": "array", "uniqueItems": False, "items": {"type": "null"}, "maxItems": 1}
    assert accepts(schema_grammar({**schema, "unevaluatedItems": True}), "[null]")


@pytest.mark.parametrize(
    "source,said",
    [
        ("{", "no JSON"),
        ('{"minimum": NaN}', "NaN"),
        ('{"items": {"minimum": -1e400}}', "float64, at #/items/minimum"),
        (
            '{"properties": {"a": {"enum": ["\\ud800"]}}}',
            "surrogate pair, at #/properties/a/enum/0",
        ),
        ('{"properties": {"\\udc00": {}}}', "surrogate pair, at #/properties"),
        ('{"properties": {"a": ' * 5000 + "1" + "}}" * 5000, "deep"),
        (json.dumps({"enum": [None]})[:-1], "no JSON"),
    ],
)
def test_a_source_that_is_no_schema(source: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        compiled(Grammar(kind="json_schema", source=source))


def test_depth_is_bounded_and_named() -> None:
    def nested(depth: int) -> Any:
        schema: Any = {"type": "null"}
        for _ in range(depth):
            schema = {"items": schema}
        return {"type": "array", **schema}

    compiled(schema_grammar(nested(MAX_DEPTH // 2)))
    with pytest.raises(InvalidRequest, match=r"nested more than .* at #/items/items"):
        compiled(schema_grammar(nested(MAX_DEPTH + 2)))


@pytest.mark.parametrize(
    "schema,good,bad",
    [
        (
            {"patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
            ['{"ab":1}', "{}"],
            ['{"ab":"x"}', '{"b":1}'],
        ),
        ({"minProperties": 1, "maxProperties": 1}, ['{"a":1}'], ["{}", '{"a":1,"b":2}']),
        ({"required": ["b"], "properties": {"a": {}}}, ['{"a":1,"b":2}', '{"b":1}'], ['{"a":1}']),
        (
            {"allOf": [{"properties": {"a": {"const": 1}}}, {"required": ["a"]}]},
            ['{"a":1}'],
            ["{}"],
        ),
        (
            {"properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
            ['{"a":{"a":{}}}'],
            ['{"a":1}'],
        ),
    ],
)
def test_keywords_of_objects(schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    grammar = schema_grammar({"type": "object", **schema})
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


@pytest.mark.parametrize(
    "schema,good,bad",
    [
        ({"items": [{"type": "integer"}], "additionalItems": False}, ["[1]"], ["[1,2]", '["a"]']),
        ({"type": "string", "pattern": "^a|b$"}, ['"ax"', '"xb"'], ['"x"']),
        ({"type": "string", "format": "email"}, ['"a@b.c"'], ['"a"']),
        ({"type": "integer", "multipleOf": 3}, ["-3", "12"], ["4"]),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, ["0.5"], ["0", "1"]),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, ["null", '"a"'], ["1"]),
        ({"type": "string", "nullable": True}, ['"a"'], ["null"]),
    ],
)
def test_keywords_of_other_values(schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    grammar = schema_grammar(schema)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []
