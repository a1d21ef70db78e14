"""Grammars of every kind as one: rules of llguidance's Lark dialect from `start`.

Pure functions of the grammar and the tokenizer's special tokens, whose work is linear in the
source: what compiles the rules may trust that nothing in them is nested deeply.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from engine.protocol import Grammar
from rollout.masks.grammar.languages.bounds import MAX_CHOICES, MAX_DEPTH, refuse
from rollout.masks.grammar.languages.gbnf_rules import gbnf_rules
from rollout.masks.grammar.languages.json_schema import read_json, served_schema
from rollout.masks.grammar.languages.regex import literal, regex_terminal
from rollout.masks.grammar.languages.structural import structural_rules

# A text that only one sequence of bytes can be is not put into tokens for the model: which tokens
# it takes for them is its own choice, and has the probability that it gave it.
_OPTIONS = "%llguidance " + json.dumps({"no_forcing": True})
_ATTRIBUTES = re.compile(r"^[ \t]*[A-Za-z_][\w.-]*[ \t]*\[([^\]\n]*)\][ \t]*:", re.M)
_BRACKET = re.compile(r'"(?:[^"\\\n]|\\.)*"|[][(){}]')
_UNSERVED = re.compile(r"\b(temperature|stop)\b[ \t]*=")


def to_lark(grammar: Grammar, special: Mapping[str, int]) -> str:
    """The rules of a grammar.

    special: ids of special tokens by their text. Raises InvalidRequest (`grammar`) naming the
    place of what is no grammar of its kind, or none that is served.
    """
    return "\n".join([*_rules(grammar, special), _OPTIONS, ""])


def schema_of(grammar: Grammar) -> dict[str, object] | None:
    """The JSON Schema of a grammar that is one; None of others. Raises as `to_lark`."""
    if grammar.kind == "json_object":
        return served_schema({"type": "object"})
    if grammar.kind == "json_schema":
        return served_schema(read_json(grammar.source, "the schema"))
    return None


def _rules(grammar: Grammar, special: Mapping[str, int]) -> list[str]:
    source = grammar.source
    match grammar.kind:
        case "json_schema" | "json_object":
            return [f"start: %json {json.dumps(schema_of(grammar))}"]
        case "regex":
            return ["start: WHOLE", f"WHOLE: {regex_terminal(source)}"]
        case "ebnf":
            root, lines = gbnf_rules(source, "g")
            return [f"start: {root}", *lines]
        case "lark":
            _check_lark(source)
            return [source]
        case "choice":
            return _choice(source)
        case "structural_tag":
            return structural_rules(source, special)


def _choice(source: str) -> list[str]:
    texts = read_json(source, "the choice")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        refuse("the choice is no list of texts")
    if not 0 < len(texts) <= MAX_CHOICES:
        refuse(f"the choice has {len(texts)} texts; give 1 to {MAX_CHOICES}")
    return ["start: CHOICE", f"CHOICE: {' | '.join(map(literal, dict.fromkeys(texts)))}"]


def _check_lark(source: str) -> None:
    """Refuse what llguidance's readers would recurse too deeply into, and what it would leave to
    the sampler."""
    for attributes in _ATTRIBUTES.finditer(source):
        if found := _UNSERVED.search(attributes[1]):
            line = source.count("\n", 0, attributes.start()) + 1
            refuse(f"line {line}: the attribute {found[1]!r} of rules is not served; leave it out")
    depth = 0
    for found in _BRACKET.finditer(source):
        # A text, which holds any of them, has no depth; in an expression one may be closed only.
        depth = max(0, depth + (found[0] in "([{") - (found[0] in ")]}"))
        if depth > MAX_DEPTH:
            line = source.count("\n", 0, found.start()) + 1
            refuse(f"line {line}: brackets are more than {MAX_DEPTH} deep")
