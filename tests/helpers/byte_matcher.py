"""A grammar's matcher over a vocabulary of bytes, with some texts as special tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from engine.protocol import Grammar


class ByteVocabulary:
    """Tokens 0..255 are the bytes, then come `markers`, then the one that ends a text."""

    def __init__(self, markers: Sequence[str] = ()) -> None:
        self._markers = {marker: 256 + index for index, marker in enumerate(markers)}
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.tokens += [marker.encode() for marker in markers] + [b"<end>"]
        self.special_token_ids = [*self._markers.values(), len(self.tokens) - 1]
        self.eos_token_id = len(self.tokens) - 1
        self.bos_token_id = None
        self._tokenizer = LLTokenizer(TokenizerWrapper(self))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)

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
        matcher = LLMatcher(self._tokenizer, grammar.source, log_level=0)
        assert not matcher.is_error(), matcher.get_error() + grammar.source
        return matcher

    def accepts(self, grammar: Grammar, text: str) -> bool:
        """Whether `text` is one of the grammar's."""
        matcher, ids = self.matcher(grammar), self.ids(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def drawn(self, grammar: Grammar, seed: int, most: int = 2000) -> str:
        """A text of the grammar: each token one of those that may come."""
        matcher, draw, found = self.matcher(grammar), random.Random(seed), []
        while not matcher.is_stopped() and len(found) < most:
            mask = matcher.compute_logit_bias()
            allowed = [token for token, value in enumerate(mask) if value]
            if self.eos_token_id in allowed and draw.random() < 0.5:
                break
            allowed = [token for token in allowed if token != self.eos_token_id]
            token = draw.choice(allowed)
            assert matcher.consume_token(token)
            found.append(token)
        assert len(found) < most
        return b"".join(self.tokens[token] for token in found).decode()
