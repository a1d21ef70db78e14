"""Grammars compiled for the byte-level tokenizer, and texts held against them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from engine.protocol import Grammar
from rollout.masks.grammar.compile import compile_grammar
from rollout.masks.grammar.vocabulary import Vocabulary, llguidance_tokenizer, vocabulary_of
from tests.helpers.fake_executor import VOCAB_SIZE
from tests.helpers.tiny_tokenizer import tiny_tokenizer


@cache
def tiny_vocabulary() -> Vocabulary:
    """The tokens of the tiny tokenizer."""
    return vocabulary_of(tiny_tokenizer(), VOCAB_SIZE)


@cache
def _tokenizer() -> LLTokenizer:
    return llguidance_tokenizer(tiny_vocabulary())


def schema_grammar(schema: Any) -> Grammar:
    """The grammar of a JSON Schema."""
    return Grammar(kind="json_schema", source=json.dumps(schema))


def compiled(grammar: Grammar) -> LLMatcher:
    """At its beginning."""
    vocabulary = tiny_vocabulary()
    return compile_grammar(grammar, _tokenizer(), vocabulary.special_tokens())


def ids_in(text: str) -> list[int]:
    """Tokens of a text; a special token where the text has it in full."""
    return tiny_tokenizer().encode(text)


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether `text` is a whole text of the grammar."""
    matcher = compiled(grammar).deep_copy()
    return matcher.consume_tokens(ids_in(text)) and matcher.is_accepting()


def begins(grammar: Grammar, text: str) -> bool:
    """Whether a text of the grammar begins with `text`."""
    return compiled(grammar).deep_copy().consume_tokens(ids_in(text))
