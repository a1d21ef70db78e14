"""The tokens of a prompt that goes on from a branch: those of the branch as they are, and what
comes behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from engine.protocol import CallPrefix
from rollout.http.capture.conversation import Conversation
from rollout.text.messages import Message
from rollout.text.tokenizer import Tokenizer
from rollout.turns.bridge import Render, behind_stop, bridge
from rollout.turns.probe import TemplateTurns, probe


class NextPrompts:
    """For the model of one server."""

    def __init__(self, tokenizer: Tokenizer, *, max_chars: int) -> None:
        """max_chars: of a conversation that is rendered."""
        self._tokenizer = tokenizer
        self._max_chars = max_chars

    @cached_property
    def turns(self) -> TemplateTurns | None:
        """What the model's chat template does to turns that are over; None without one."""
        if self._tokenizer.chat_template is None:
            return None
        return probe(self._render({}))

    def text_of(self, ids: Sequence[int]) -> str:
        """What tokens say, special ones included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def text_of_text(self, text: str) -> str:
        """The same of a text's tokens, with those that are added to a prompt."""
        return self.text_of(self._tokenizer.encode(text))

    def by_text(self, prefix: CallPrefix, text: str) -> list[int] | None:
        """Tokens of `text`, which begins with what the branch `prefix` says: the branch, and the
        rest encoded. None if they would say anything else."""
        rest = text.encode()[prefix.text_bytes :].decode()
        ids: list[int] = prefix.ids.tolist()
        if rest:
            ids += self._tokenizer.encode(rest, add_special_tokens=False)
        return ids if self.text_of(ids) == text else None

    def by_key(self, prefix: CallPrefix, conversation: Conversation) -> list[int] | None:
        """The branch `prefix` and the bridge to the conversation's next reply; None where the
        template does not tell it, or ends turns otherwise than the branch ends."""
        size = conversation.replies()[prefix.key]
        before, after = conversation.messages[: size - 1], conversation.messages[size:]
        if not conversation.own_template:
            return None
        rest = bridge(self._render(conversation.variables), before, after)
        if rest is not None and prefix.stopped >= 0:
            rest = behind_stop(rest, self.text_of([prefix.stopped]))
        if rest is None:
            return None
        ids: list[int] = prefix.ids.tolist()
        return ids + self._tokenizer.encode(rest, add_special_tokens=False)

    def _render(self, variables: Mapping[str, Any]) -> Render:
        def render(messages: Sequence[Message], generation: bool) -> str:
            template = self._tokenizer.template_for(variables.get("tools"))
            own = {**variables, "add_generation_prompt": generation}
            return template.write(messages, own, max_chars=self._max_chars)

        return render
