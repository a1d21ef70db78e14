"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from engine.errors import InvalidRequest, SlipstreamError, UnsupportedOption
from rollout.http.anthropic.blocks import ContentBlocks
from rollout.http.anthropic.bodies import (
    NAMES,
    CountBody,
    MessagesBody,
    chat_body,
    parse_messages,
)
from rollout.http.anthropic.input_messages import to_chat
from rollout.http.chat.conversation import Conversation, translating
from rollout.http.chat.turn import Turn, start_turn
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import whole_body
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import NAMED, EventStream, answer
from rollout.http.openai.call import usage, version_fields
from rollout.http.openai.model_routes import check_model
from rollout.http.openapi import takes
from rollout.http.services import Services

_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class MessageAborted(SlipstreamError):
    """A message was aborted, for which the dialect has no stop reason; send it again."""

    status = 503


def router(services: Services) -> Routes:
    """The routes."""
    routes = Routes()

    async def messages(request: Request) -> Response:
        return await answer(request, reply_to_messages(services, await whole_body(request)))

    async def count_tokens(request: Request) -> Response:
        return await answer(request, _count(services, await whole_body(request)))

    for path, handler, body in (
        ("/v1/messages", messages, MessagesBody),
        ("/v1/messages/count_tokens", count_tokens, CountBody),
    ):
        routes.add_api_route(path, handler, methods=["POST"], openapi_extra=takes(body))
    return routes


async def reply_to_messages(services: Services, data: bytes) -> Response:
    """The reply to one body. Raises the typed error that it is refused or fails with."""
    if services.prompts is not None:
        services.prompts.check_size(len(data))
    body = await services.generator.parsed(parse_messages, data, MessagesBody)
    conversation = to_chat(body.system, body.messages)
    _check_last(conversation)
    chat = chat_body(body, conversation.messages)
    with translating(NAMES, conversation):
        turn = await start_turn(
            services, services.prompts, chat, len(data), prefix="msg_", object_name="message"
        )
    writer = _Writer(turn)
    if body.stream:
        return EventStream(writer.frames(), NAMED)
    return json_response(await writer.reply())


def _check_last(conversation: Conversation) -> None:
    """Refuse a conversation that ends with the assistant, whose words would have to go on."""
    where = list(conversation.places.values())[-1]
    if conversation.messages[-1]["role"] == "assistant":
        raise UnsupportedOption(
            f"{where} is the assistant's, and last: its text is not gone on with; end with the "
            "user's turn",
            field=where,
        )


async def _count(services: Services, data: bytes) -> Response:
    """How many tokens the prompt of a body has."""
    prompts = services.prompts
    if prompts is None:
        raise InvalidRequest("this model has no tokenizer", field="messages")
    prompts.check_size(len(data))
    body = await services.generator.parsed(parse_messages, data, CountBody)
    check_model(services, body.model)
    conversation = to_chat(body.system, body.messages)
    with translating(NAMES, conversation):
        prompt = await prompts.prompt(chat_body(body, conversation.messages), len(data))
    return json_response({"input_tokens": len(prompt.ids)})


class _Writer:
    """Writes the one reply of a turn as a message."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._call = turn.call
        self._sample = turn.call.samples[0]
        self._content = ContentBlocks()

    async def reply(self) -> dict[str, Any]:
        """Run to the end."""
        (events,) = await self._turn.finish()
        for _ in self._content.take(events):
            pass
        for _ in self._content.end():
            pass
        return {**self._message(), **self._ending(), "usage": self._usage(), **self._versions()}

    async def frames(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream."""
        num_prompt = len(self._sample.request.prompt_ids)
        start = {**self._message(), "usage": {"input_tokens": num_prompt, "output_tokens": 0}}
        yield {"type": "message_start", "message": start}
        yield {"type": "ping"}
        async with aclosing(self._turn.deltas()) as deltas:
            async for found in deltas:
                for frame in self._content.take(found.events):
                    yield frame
        for frame in self._content.end():
            yield frame
        delta = {**self._ending(), **self._versions()}
        yield {"type": "message_delta", "delta": delta, "usage": self._usage()}
        yield {"type": "message_stop"}

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._call.call.prefix,
            "type": "message",
            "role": "assistant",
            "model": self._call.services.config.model_name,
            "content": self._content.blocks,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _ending(self) -> dict[str, Any]:
        """Why the message ended. Raises the error of one that was aborted, which the dialect has no
        word for."""
        finish = self._sample.finish
        assert finish is not None, "the turn is over"
        if finish.type not in _REASONS:
            raise MessageAborted(f"the message was aborted: {finish.message}", field="message")
        matched = finish.matched if isinstance(finish.matched, str) else None
        reason = _REASONS[finish.type]
        if finish.type == "stop":
            if self._turn.reply().calls:
                reason = "tool_use"
            elif matched is not None:
                reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": matched}

    def _usage(self) -> dict[str, Any]:
        """Counts; those of the prompt tell tokens that were cached from the others."""
        counts = usage(self._call.samples)
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": counts["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": counts["completion_tokens"],
        }

    def _versions(self) -> dict[str, Any]:
        return version_fields(self._sample, self._call.services.labels)
