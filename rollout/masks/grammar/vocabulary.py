"""The tokens of a model as llguidance knows them: their bytes, whatever the tokenizer."""

from __future__ import annotations

from pathlib import Path

import msgspec
from llguidance import LLTokenizer, TokenizerWrapper

from engine.errors import InvalidRequest, ModelNotFound
from rollout.masks.grammar.panics import contained
from rollout.text.tokenizer import Tokenizer, load_tokenizer

_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30)
_SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_CHARACTER}{{1,{length}}}" for length in _LENGTHS),
    f"{_CHARACTER}+",
]
"""Sets of tokens whose masks inside JSON strings are computed once; of a string whose length is
bounded, those short enough for what is left of it. With llguidance's own four, a mask takes 1.1 to
1.4 times as long."""


class Vocabulary(msgspec.Struct, frozen=True):
    """tokens: bytes of each token by id, of special tokens the text they are written as; none where
    an id stands for nothing. special_ids: those that add nothing to a text."""

    tokens: list[bytes]
    special_ids: list[int]

    @property
    def size(self) -> int:
        """Tokens of the model, those that its tokenizer does not have included."""
        return len(self.tokens)

    @property
    def end_id(self) -> int:
        """The id by which `llguidance_tokenizer` says that a text is whole: one behind all tokens,
        since which tokens end a sequence depends on its request."""
        return len(self.tokens)

    def special_tokens(self) -> dict[str, int]:
        """Ids of special tokens by their text."""
        found = {}
        for token_id in self.special_ids:
            found[self.tokens[token_id].decode(errors="replace")] = token_id
        return found


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """The tokens of a model with `vocab_size` logits, in about 5 µs a token."""
    tokens, special_ids = [], []
    for token_id in range(vocab_size):
        tokens.append(tokenizer.token_bytes(token_id))
        shown = tokenizer.is_shown(token_id, skip_special_tokens=True)
        if not shown and tokens[-1]:
            special_ids.append(token_id)
    return Vocabulary(tokens, special_ids)


def load_vocabulary(model: str | Path, vocab_size: int) -> Vocabulary:
    """The tokens of a model from its files. Raises InvalidRequest (`grammar`) for one that came
    without a tokenizer."""
    try:
        tokenizer = load_tokenizer(model)
    except ModelNotFound as error:
        raise InvalidRequest(
            "this model came without a tokenizer, so no text can be asked of it; leave grammar out",
            field="grammar",
        ) from error
    return vocabulary_of(tokenizer, vocab_size)


def llguidance_tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    """What llguidance compiles grammars for; with `Vocabulary.end_id` one token more."""
    return contained(LLTokenizer, TokenizerWrapper(_Tokens(vocabulary)), slices=_SLICES)


class _Tokens:
    """What `TokenizerWrapper` reads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = [*vocabulary.tokens, b""]
        self.eos_token_id = vocabulary.end_id
        self.bos_token_id = None
        self.special_token_ids = vocabulary.special_ids

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that has to come, which are asked for where texts are forced: nowhere
        here."""
        return []
