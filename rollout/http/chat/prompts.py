"""From the messages of a chat body to the ids of its prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.errors import ContextTooLong, InvalidRequest, UnsupportedOption
from engine.protocol import ReplicaState
from rollout.http.chat.thinking import thinking_variables
from rollout.http.config import ServeConfig
from rollout.http.native.generator import Generator
from rollout.http.openai.bodies import ChatBody
from rollout.http.openai.chat_render import ChatRenderer
from rollout.parsers.formats import OFF, ReplyFormat, select_format
from rollout.requests.expand import check_text
from rollout.text.tokenizer import Tokenizer

# A character is at most six bytes of JSON; templates leave some of what comes out.
_BYTES_PER_CHAR = 8
_MORE_BYTES = 1 << 20
_FORCED = "hermes"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrompt:
    """A conversation as the template writes it, and its ids."""

    text: str
    ids: list[int]


class ChatPrompts:
    """Writes the conversations of one server, and knows the format of the replies to them."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, config: ServeConfig) -> None:
        self.tokenizer = tokenizer
        self._generator = generator
        self._config = config
        self._renderer = ChatRenderer(tokenizer, trusted=config.trust_request_chat_template)
        self._formats: dict[str, ReplyFormat] = {}

    def check_size(self, num_bytes: int, field: str = "messages") -> None:
        """Refuse, before it is decoded, a body far beyond what a context of text needs. Raises
        ContextTooLong. field: what the dialect calls the conversation."""
        most = _BYTES_PER_CHAR * self._max_chars() + _MORE_BYTES
        if num_bytes > most:
            raise ContextTooLong(
                f"the body has {num_bytes} bytes; the context of this model takes messages in "
                f"at most {most}",
                field=field,
            )

    async def prompt(self, body: ChatBody, num_bytes: int) -> ChatPrompt:
        """The prompt of a conversation; num_bytes: of the body that it came in.

        Raises InvalidRequest for messages that the template cannot write or writes nothing for,
        ContextTooLong for text beyond the context, UnsupportedOption for a `reasoning_effort` that
        the template does not know.
        """
        text = await self.text(body, num_bytes)
        check_text(text, self.tokenizer, self._facts.context_length, field="messages")
        ids = await self._generator.encoded(text)
        if not ids:
            raise InvalidRequest("the chat template wrote nothing", field="messages")
        return ChatPrompt(text=text, ids=ids)

    async def text(self, body: ChatBody, num_bytes: int) -> str:
        """A conversation as the template writes it. Arguments and errors as in `prompt`."""
        own = body.chat_template in (None, self.tokenizer.chat_template)
        return await self._renderer.render(
            body.messages,
            self.variables(body),
            source=None if own else body.chat_template,
            num_bytes=num_bytes,
            max_chars=self._max_chars(),
        )

    def reply_format(self, body: ChatBody, *, forced: bool) -> ReplyFormat:
        """How the replies to a conversation write calls and reasoning: as the model's own template
        tells, also where the request brings another.

        forced: a call has to come, which is written as Hermes does where the family is not known.
        Raises UnsupportedOption (`tool_choice`) where parsers of calls are turned off.
        """
        without = body.chat_template is not None and self.tokenizer.chat_template is None
        source = "" if without else self.tokenizer.template_for(body.tools).source
        found = self._formats.get(source)
        if found is None:
            found = self._formats[source] = self._select(source)
        if not forced or found.tool_parser is not None:
            return found
        if self._config.tool_parser == OFF:
            raise UnsupportedOption(
                "tool_choice forces a call, and this server was started with --tool-parser none",
                field="tool_choice",
            )
        return replace(found, tool_parser=_FORCED)

    def _select(self, source: str) -> ReplyFormat:
        return select_format(
            source,
            self._config.tool_parser,
            self._config.reasoning_parser,
            special_token_id=self.tokenizer.special_token_id,
        )

    def variables(self, body: ChatBody) -> dict[str, Any]:
        """What the template is rendered with beside the messages. Raises as `prompt` does."""
        thinking: dict[str, Any] = {}
        if body.reasoning_effort is not None:
            # What a request brings is not looked into here.
            own = self.tokenizer.template_for(body.tools) if body.chat_template is None else None
            known = () if own is None else own.variables
            thinking = thinking_variables(body.reasoning_effort, known, field="reasoning_effort")
        return {
            "add_generation_prompt": body.add_generation_prompt,
            "tools": body.tools,
            **thinking,
            **(body.chat_template_kwargs or {}),
        }

    @property
    def _facts(self) -> ReplicaState:
        return self._generator.engine.facts

    def _max_chars(self) -> int:
        return self._facts.context_length * self.tokenizer.longest_token_bytes
