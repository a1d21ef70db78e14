"""The tokens of a program's state: plain text, or turns with replies between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from engine.errors import InvalidRequest
from rollout.programs.conversation import Conversation
from rollout.programs.generated import Generated, Selected
from rollout.text.detokenizer import IncrementalDecoder
from rollout.text.tokenizer import Tokenizer


class Context:
    """What comes before the next token. It grows at its end: tokens that a request has seen stay
    as they are, so that the next request finds their KV.

    tokenizer, variables: as in `Conversation`.
    """

    def __init__(self, tokenizer: Tokenizer, variables: Mapping[str, Any]) -> None:
        self.turns = Conversation(tokenizer, variables)
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._text: list[str] = []
        self._in_reply = False

    def copied(self) -> Self:
        """Another one that goes on from here."""
        # Lists of tokens are never changed in place.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._text = list(self._text)
        other.turns = self.turns.copied()
        return other

    def ids(self) -> list[int]:
        """All tokens so far, encoded once; the caller does not change them."""
        if self._text:
            text, self._text = "".join(self._text), []
            special = not self._ids and not self._in_reply
            self._ids = self._ids + self._tokenizer.encode(text, add_special_tokens=special)
        if self.turns.begun and not self._in_reply:
            self._ids = self.turns.write(self._ids, generation=False)
        return self._ids

    def text(self) -> str:
        """What the tokens say, special ones included."""
        return self._tokenizer.decode(self.ids(), skip_special_tokens=False)

    def add_turn(self, role: str, content: str, **fields: Any) -> None:
        """A turn of a conversation. Raises InvalidRequest (the role) behind plain text, or within a
        reply."""
        if self._in_reply:
            raise InvalidRequest(f"{role}: the reply before is not over", field=role)
        if not self.turns.begun and (self._ids or self._text):
            raise InvalidRequest(
                f"{role}: a state has turns or plain text; this one began with text", field=role
            )
        self.turns.add(role, content, **fields)

    def add_text(self, text: str) -> None:
        """Text behind what there is: of a conversation, within a reply. Raises InvalidRequest
        (`add`)."""
        self._may_add()
        self._text.append(text)

    def add_variable(self, found: Generated | Selected) -> None:
        """What was generated or selected, by the tokens that it is. Raises as `add_text`."""
        self._may_add()
        self._ids = self.ids() + self._shown(found)

    def begin_reply(self) -> bool:
        """Open the assistant's turn, if this is a conversation outside of one; whether it did."""
        if self._in_reply or not self.turns.begun:
            return False
        self._ids = self.turns.write(self._ids, generation=True)
        self._in_reply = True
        return True

    def end_reply(self) -> None:
        """Close the turn that `begin_reply` opened."""
        self.turns.end_reply(len(self.ids()))
        self._in_reply = False

    def _may_add(self) -> None:
        if self.turns.begun and not self._in_reply:
            raise InvalidRequest(
                "a conversation has no text between its turns; use system, user or assistant, or "
                "add within `with state.reply()`",
                field="add",
            )

    def _shown(self, found: Generated | Selected) -> list[int]:
        """The tokens of a variable's text. Of one that a stop ended, those before it; a token that
        a stop string cuts through gives way to the text before it, encoded."""
        if isinstance(found, Selected) or found.finish != "stop" or found.matched is None:
            return found.token_ids
        if isinstance(found.matched, int):
            return found.token_ids[:-1]
        return self._before_stop(found)

    def _before_stop(self, found: Generated) -> list[int]:
        decoder = self._decoder(found)
        ends, size = [(0, 0)], 0
        for place, token_id in enumerate(found.token_ids, start=1):
            size += len(decoder.add(token_id))
            if size > len(found.text):
                break
            if size > ends[-1][1]:
                ends.append((place, size))
        # A token may begin a character that the one cut through completes.
        while (
            self._decoder(found).whole(found.token_ids[: ends[-1][0]]) != found.text[: ends[-1][1]]
        ):
            ends.pop()
        kept, end = ends[-1]
        rest = found.text[end:]
        behind = self._tokenizer.encode(rest, add_special_tokens=False) if rest else []
        return [*found.token_ids[:kept], *behind]

    def _decoder(self, found: Generated) -> IncrementalDecoder:
        return IncrementalDecoder(
            self._tokenizer, skip_special_tokens=not found.with_special, prompt_ids=self._ids
        )
