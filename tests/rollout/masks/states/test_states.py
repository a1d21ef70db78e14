"""States of outputs: those that are in one have one mask, whatever tokens led there."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.protocol import BitArray, Grammar
from rollout.masks.base import bits_of
from rollout.masks.grammar.compile import compile_grammar
from rollout.masks.grammar.languages.translate import schema_of
from rollout.masks.grammar.vocabulary import Vocabulary, llguidance_tokenizer
from rollout.masks.states.json_text import JsonText
from rollout.masks.states.outputs_alike import OutputsAlike
from rollout.masks.states.states import State, States
from rollout.masks.states.token_lengths import token_lengths
from tests.helpers.grammars import schema_grammar
from tests.helpers.schemas import random_schema

STRUCTURE = '{" ": "," "} "] ],[ },{ [[ ]] a": "a 9} [1 "\\n \\n \\" \\u00 é"'
PLAIN = "12 100 -1 .5 e+ e-1 00 ab abc x1 name é 日本 😀 true null fal"
SPACED = ['": "', '", "', "0, ", "  ", " \n"]
MORE = [*STRUCTURE.split(), *PLAIN.split(), *SPACED]
TOKENS = [bytes([byte]) for byte in range(256)] + [text.encode() for text in MORE] + [b""]
END = len(TOKENS) - 1
"""Ends an output; what no grammar asks for."""


@cache
def tokenizer() -> LLTokenizer:
    return llguidance_tokenizer(Vocabulary(TOKENS, []))


def states_of(grammar: Grammar, *after_ids: int) -> States:
    schema = schema_of(grammar)
    reader = OutputsAlike() if schema is None else JsonText(schema, TOKENS, token_lengths(TOKENS))
    return States(reader, TOKENS, ending_ids=[END], after_ids=after_ids)


def mask_of(matcher: LLMatcher) -> BitArray:
    """What may come, END where the text is whole."""
    flags = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    allowed = np.flatnonzero(flags[: len(TOKENS)]).tolist()
    ends = [END] if flags[len(TOKENS)] else []
    return bits_of(allowed + ends, len(TOKENS))


def chosen(allowed: list[int], rng: random.Random) -> int:
    """Longer tokens as often as single bytes, and seldom whitespace, which would fill the text."""
    weights = [0.02 if TOKENS[one].isspace() else (2.0 if one >= 256 else 1.0) for one in allowed]
    return rng.choices(allowed, weights)[0]


def walks(
    grammar: Grammar, states: States, num: int, rng: random.Random
) -> Iterator[tuple[State, BitArray, list[int]]]:
    """At every token of some outputs: the state, the mask as computed from all tokens, these."""
    start = compile_grammar(grammar, tokenizer(), {})
    for _ in range(num):
        matcher, state, tokens = start.deep_copy(), states.walk([]), []
        for _ in range(60):
            bits = mask_of(matcher)
            yield state, bits, tokens
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
            token = chosen(allowed.tolist(), rng)
            if token == END:
                break
            assert matcher.consume_token(token)
            tokens.append(token)
            state = state.after(token)


def check(grammar: Grammar, num: int, rng: random.Random) -> float:
    """Raise AssertionError where two outputs of one state have different masks; the share of masks
    that were known."""
    states = states_of(grammar)
    known = total = 0
    for state, bits, tokens in walks(grammar, states, num, rng):
        total += 1
        if state.mask is None:
            states.learn(state, bits)
        else:
            known += 1
            text = b"".join(TOKENS[token] for token in tokens)
            assert state.mask.bits is not None
            assert state.mask.bits.tolist() == bits.tolist(), (grammar.source, text, state.key)
    return known / total


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "a": {"anyOf": [{"type": "string", "minLength": 2}, {"type": "null"}]},
        "b": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        "c": {"anyOf": [{"type": "number"}, {"type": "array", "items": {"type": "boolean"}}]},
    },
    "required": ["name"],
    "additionalProperties": {"type": "integer", "minimum": 1},
}
SCHEMAS: list[Any] = [
    True,
    {"type": "object"},
    {"type": "number"},
    {"type": ["integer", "string", "null"], "maxLength": 3, "minLength": 1},
    {"type": "array", "items": {"type": "string", "minLength": 3}, "minItems": 2},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "integer"}], "items": False},
    {"type": "array", "items": {"type": "array", "items": {"enum": ["ab", "abc", 1, 12]}}},
    PERSON,
    {"$defs": {"x": PERSON}, "type": "array", "items": {"$ref": "#/$defs/x"}},
    {
        "oneOf": [
            {"type": "array", "items": {"type": "string", "maxLength": 2}},
            PERSON,
        ]
    },
    {"type": "object", "properties": {"a": {"pattern": "^a+1?$", "type": "string"}, "b": True}},
    {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}},
    {"anyOf": [{"$ref": "#/anyOf/1"}, {"type": "string", "maxLength": 4}, {"$ref": "#/anyOf/1"}]},
]


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_outputs_of_one_state_have_one_mask(number: int) -> None:
    check(schema_grammar(SCHEMAS[number]), 25, random.Random(number))


@pytest.mark.parametrize("seed", range(25))
def test_outputs_of_one_state_of_any_schema_have_one_mask(seed: int) -> None:
    rng = random.Random(seed)
    check(schema_grammar(random_schema(rng)), 12, rng)


BOUNDS = [(0, 7), (0, 100), (-5, 12), (3, 1234), (-120, -7), (0, None), (1, None), (None, 9),
          (None, None), (10, None), (99, 101), (0, 0), (-1, 100_000)]  # fmt: skip


@pytest.mark.parametrize("least,most", BOUNDS)
def test_integers_whose_bounds_leave_the_same_digits_have_one_mask(
    least: int | None, most: int | None
) -> None:
    schema: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
    schema["items"] |= {} if least is None else {"minimum": least}
    schema["items"] |= {} if most is None else {"maximum": most}
    check(schema_grammar(schema), 40, random.Random(3))


def test_most_masks_of_a_schema_that_many_follow_are_known() -> None:
    item = {"type": "integer", "minimum": 0, "maximum": 99_999}
    text = {"type": "string", "minLength": 5, "maxLength": 20}
    names = [f"n{n}" for n in range(4)]
    schema = {
        "type": "object",
        "properties": {name: item if n % 2 else text for n, name in enumerate(names)},
        "required": names,
        "additionalProperties": False,
    }
    assert check(schema_grammar(schema), 60, random.Random(5)) > 0.6


def test_of_other_grammars_outputs_that_are_alike_to_the_token_have_one_mask() -> None:
    for kind, source in (
        ("regex", "(ab|abc)+12?"),
        ("choice", json.dumps(["abc12", "abab", "ab12"])),
        ("lark", 'start: "a" few "12"\nfew[max_tokens=2]: /(ab)*/\n'),
    ):
        assert check(Grammar(kind=kind, source=source), 30, random.Random(1)) > 0.3


def test_tokens_that_end_an_output_and_those_before_its_constraint() -> None:
    grammar = Grammar(kind="choice", source='["ab"]')
    first, second = TOKENS.index(b"ab"), TOKENS.index(b"abc")
    states = states_of(grammar, first, second)
    start = states.walk([])
    assert start.mask is not None and start.mask.bits is not None
    assert start.mask.bits.tolist() == bits_of(range(END), len(TOKENS)).tolist()
    # What it begins behind may come after the beginning of itself.
    assert states.walk([first, first]).mask is start.mask
    begun = states.walk([first, first, second])
    assert begun.mask is None and begun is states.walk([7, first, second])
    over = begun.after(first).after(END)
    assert over.mask is not None and over.mask.bits is not None
    assert over.mask.bits.tolist() == bits_of([END], len(TOKENS)).tolist()
    assert over.after(END) is over


def test_a_mask_is_kept_once_and_one_that_allows_nothing_never() -> None:
    states = states_of(schema_grammar({"type": "string"}))
    one, two = states.walk([]), states.walk([TOKENS.index(b'"')])
    bits = bits_of([1, 5], len(TOKENS))
    states.learn(one, bits)
    states.learn(two, bits.copy())
    assert one.mask is two.mask is not None
    third = two.after(TOKENS.index(b"ab"))
    assert third is two
    states.learn(fourth := one.after(32), np.zeros_like(bits))
    assert fourth.mask is None
