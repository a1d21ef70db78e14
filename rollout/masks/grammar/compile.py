"""A grammar compiled for a vocabulary: a matcher that stands at its beginning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from engine.protocol import Grammar
from rollout.masks.grammar.languages.bounds import parser_limits, refuse
from rollout.masks.grammar.languages.json_schema import subschemas
from rollout.masks.grammar.languages.translate import schema_of, to_lark
from rollout.masks.grammar.panics import Panic, contained

_DEFINITIONS = ("$defs", "definitions", "$id", "$schema")
_SHOWN = re.compile(r"\d+ \||\^+$|<non-verbose/>$")
_PLACE = re.compile(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?")
_CLEARER = {"NoExtensionBias": "no text fits it"}
"""Words of llguidance's own."""
_MAX_TRIED = 200
"""Most parts of a schema that are compiled alone to find the one that is not served."""


def compile_grammar(
    grammar: Grammar, tokenizer: LLTokenizer, special: Mapping[str, int]
) -> LLMatcher:
    """The matcher of a grammar, which no output has moved; `deep_copy` gives one for each output.

    special: as in `to_lark`. Lets go of the interpreter while llguidance is at it. Raises
    InvalidRequest (`grammar`) naming the place of what is no grammar, is not served, or asks for
    more than `bounds` allows.
    """
    lark = to_lark(grammar, special)
    try:
        matcher = _matcher(lark, tokenizer)
    except Panic as error:
        refuse(f"it cannot be served: {error}")
    if matcher.is_error():
        problem = told(matcher)
        if grammar.kind != "lark":
            # A place in the rules, which are ours.
            problem = _PLACE.sub("", problem)
        refuse(f"{_place_in_schema(grammar, problem, tokenizer)}{problem}")
    return matcher


def _matcher(lark: str, tokenizer: LLTokenizer) -> LLMatcher:
    return contained(LLMatcher, tokenizer, lark, log_level=0, limits=parser_limits())


def told(matcher: LLMatcher) -> str:
    """What llguidance says is wrong, on one line, without the source that it shows. Of a matcher
    that is in error."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    found = " ".join(line for line in lines if line and not _SHOWN.match(line))[:500]
    return _CLEARER.get(found, found)


def _place_in_schema(grammar: Grammar, problem: str, tokenizer: LLTokenizer) -> str:
    """Where in a JSON Schema that is: of its parts, the innermost that alone is refused for the
    same reason. "" of other grammars."""
    schema = schema_of(grammar)
    if schema is None:
        return ""
    common = {name: schema[name] for name in _DEFINITIONS if name in schema}
    place, num_tried = "#", 0
    for where, part in subschemas(schema):
        if not where.startswith(f"{place}/") or num_tried >= _MAX_TRIED:
            continue
        num_tried += 1
        if _refused_alike(part, common, problem, tokenizer):
            place = where
    return f"{place}: "


def _refused_alike(
    part: dict[str, Any], common: dict[str, Any], problem: str, tokenizer: LLTokenizer
) -> bool:
    alone = _matcher(f"start: %json {json.dumps({**common, **part})}\n", tokenizer)
    return alone.is_error() and _PLACE.sub("", told(alone)) == problem
