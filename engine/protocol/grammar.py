"""What the text of an output must be, beside what the model would like."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from engine.protocol.types import GrammarKind, GrammarSource, TokenIds


class Grammar(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A language that the text of an output has to be of: masks let only tokens come that lead to
    a text of it, and a stop token only where the text is whole.

    kind, source:
        json_schema: a JSON Schema, as JSON text; the output is a value that fits it.
        json_object: any JSON object; `source` is empty.
        regex: a regular expression in the syntax of Rust's regex crate, without look-around; it
            matches the whole output.
        ebnf: rules `name ::= ...` from `root`, in the form of llama.cpp's GBNF.
        lark: rules of llguidance's Lark dialect from `start`.
        choice: a list of texts, as JSON text; the output is one of them.
        structural_tag: free text in which what follows some triggers is constrained, as JSON text:
            `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}` (SGLang's form), or
            xgrammar's `{"format": ...}`.
    after_ids: the constraint begins behind the first occurrence of these tokens, in this order, in
        the output: those that end a thinking block. Before it anything may come but a stop token.
        Empty: it begins at once.

    Example: `Grammar(kind="choice", source='["yes", "no"]')`.
    """

    kind: GrammarKind
    source: GrammarSource
    after_ids: TokenIds = msgspec.field(default_factory=list)
