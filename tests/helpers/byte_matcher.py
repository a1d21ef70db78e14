"""A grammar as the engine compiles it, over a vocabulary of bytes with some special tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llguidance import LLMatcher

from engine.protocol import Grammar
from rollout.masks.grammar.compile import compile_grammar
from rollout.masks.grammar.vocabulary import Vocabulary, llguidance_tokenizer


class ByteVocabulary:
    """Tokens 0..255 are the bytes, then come `markers`, which are special tokens."""

    def __init__(self, markers: Sequence[str] = ()) -> None:
        self._markers = {marker: 256 + index for index, marker in enumerate(markers)}
        tokens = [bytes([byte]) for byte in range(256)] + [marker.encode() for marker in markers]
        self._vocabulary = Vocabulary(tokens, list(self._markers.values()))
        self._tokenizer = llguidance_tokenizer(self._vocabulary)

    def special_token_id(self, text: str) -> int | None:
        """Id of a marker."""
        return self._markers.get(text)

    def ids(self, text: str) -> list[int]:
        """A text in tokens, markers as such."""
        found: list[int] = []
        while text:
            places = {text.find(marker): marker for marker in self._markers if marker in text}
            at = min(places, default=len(text))
            found += text[:at].encode()
            if places:
                found.append(self._markers[places[at]])
                at += len(places[at])
            text = text[at:]
        return found

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """What stands at the beginning of a grammar."""
        return compile_grammar(grammar, self._tokenizer, self._markers)

    def accepts(self, grammar: Grammar, text: str) -> bool:
        """Whether `text` is one of the grammar's."""
        matcher, ids = self.matcher(grammar), self.ids(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def drawn(self, grammar: Grammar, seed: int, most: int = 2000) -> str:
        """A text of the grammar: each token one of those that may come."""
        matcher, draw, found = self.matcher(grammar), random.Random(seed), []
        end = self._vocabulary.end_id
        while not matcher.is_stopped() and len(found) < most:
            mask = matcher.compute_logit_bias()
            allowed = [token for token, value in enumerate(mask) if value and token < end]
            if mask[end] and draw.random() < 0.5:
                break
            found.append(draw.choice(allowed))
            assert matcher.consume_token(found[-1])
        assert len(found) < most
        return b"".join(self._vocabulary.tokens[token] for token in found).decode()
