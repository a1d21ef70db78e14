"""The turns of a program, written by the model's chat template and encoded once.

A conversation is a list of segments: the turns up to the first reply, the reply, the turns up to
the next one, and so on. Replies are the tokens that were sampled. A later segment is the bridge
between two replies (`rollout/turns/bridge.py`), so that the cost of a turn does not grow with the
conversation, and what came before stays as it is to the token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from engine.errors import InvalidRequest
from rollout.parsers.formats import ReplyFormat, select_format
from rollout.text.messages import Message
from rollout.text.tokenizer import Tokenizer
from rollout.turns.bridge import bridge

_TOLD = """\
You may call these functions:
{tools}
To call one, write
<tool_call>
{{"name": "the function", "arguments": {{...}}}}
</tool_call>
and its result comes in the next message."""
_OWN_FORM = "hermes"
"""How calls are written where the template has no word for tools, and `_TOLD` has."""


class Conversation:
    """The turns of one state, and what of them is written already.

    variables: what the template gets beside messages and tools.
    """

    def __init__(self, tokenizer: Tokenizer, variables: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(variables)
        self._before: list[Message] = []
        self._new: list[Message] = []
        self._tools: list[Mapping[str, Any]] | None = None
        self._start = 0
        self._said = ""

    @property
    def begun(self) -> bool:
        """Whether there is any turn."""
        return bool(self._new or self._before)

    def copied(self) -> Self:
        """Another one that goes on from here."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._new, other._before = list(self._new), list(self._before)
        return other

    def offer(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Tell the model of tools. Raises InvalidRequest (`tools`) once something is written."""
        if self._said or self._before:
            raise InvalidRequest(
                "tools are told at the beginning of a conversation; use them before the first turn "
                "that is generated or forked",
                field="tools",
            )
        self._tools = list(tools)

    def add(self, role: str, content: str, **fields: Any) -> None:
        """One more turn, written with the next reply or fork."""
        self._new.append({"role": role, "content": content, **fields})

    def write(self, ids: list[int], *, generation: bool) -> list[int]:
        """The tokens of the conversation, whose `ids` are written so far, with the turns since.

        generation: with the prompt for a reply. What was written since the last reply is written
        again where the template writes it otherwise now. Raises InvalidRequest (`messages`) for
        turns that the template cannot write.
        """
        if not self._new and not generation:
            return ids
        text = self._text(generation)
        if not text.startswith(self._said):
            ids, self._said = ids[: self._start], ""
        rest = text[len(self._said) :]
        self._said = text
        return ids + self._tokenizer.encode(rest, add_special_tokens=False) if rest else ids

    def end_reply(self, num_ids: int) -> None:
        """A reply was added behind what `write` wrote; the conversation has `num_ids` tokens."""
        if not self._before:
            self._before = self._new[:1] or [{"role": "user", "content": ""}]
        self._new, self._said, self._start = [], "", num_ids

    def reply_format(self) -> ReplyFormat:
        """How replies write calls and thinking."""
        template = self._tokenizer.template_for(self._tools)
        found = select_format(template.source, special_token_id=self._tokenizer.special_token_id)
        if found.tool_parser is None or not self._template_tells_tools():
            found = select_format(
                template.source, _OWN_FORM, special_token_id=self._tokenizer.special_token_id
            )
        return found

    def thinks_at_once(self) -> bool:
        """Whether the reply whose prompt was just written begins within a thinking block."""
        return self.reply_format().prompt_ends_in_thinking(self._said)

    @property
    def tools(self) -> list[Mapping[str, Any]]:
        """Those that were offered."""
        return self._tools or []

    def _text(self, generation: bool) -> str:
        if not self._before:
            return self._render(self._with_tools_told(self._new), generation)
        before = self._with_tools_told(self._before)
        text = bridge(lambda turns, _: self._render(turns, generation), before, self._new)
        if text is None:
            roles = ", ".join(str(message["role"]) for message in self._new) or "nothing"
            raise InvalidRequest(
                f"the chat template of this model does not tell what comes between a reply and "
                f"these turns ({roles})",
                field="messages",
            )
        return text

    def _render(self, messages: Sequence[Message], generation: bool) -> str:
        own = {**self._variables, "tools": self._tools, "add_generation_prompt": generation}
        return self._tokenizer.template_for(self._tools).write(messages, own)

    def _template_tells_tools(self) -> bool:
        return "tools" in self._tokenizer.template_for(self._tools).variables

    def _with_tools_told(self, messages: Sequence[Message]) -> Sequence[Message]:
        """With the tools in the system's turn, where the template has no word for them."""
        if not self._tools or self._template_tells_tools():
            return messages
        told = _TOLD.format(tools="\n".join(json.dumps(tool) for tool in self._tools))
        first = messages[0] if messages else None
        if first is None or first["role"] not in ("system", "developer"):
            return [{"role": "system", "content": told}, *messages]
        return [{**first, "content": f"{first['content']}\n\n{told}"}, *messages[1:]]
