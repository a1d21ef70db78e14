"""POST /v1/chat/completions, with the fields that TRL reads (docs/external_trainers.md)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from engine.errors import ContextTooLong, InvalidRequest, UnsupportedOption
from engine.protocol import GenerateRequest, RequestOutput
from rollout.http.edge.errors import json_response
from rollout.http.edge.sse import EventStream, answer
from rollout.http.native.sample import Sample, SampleDelta
from rollout.http.openai.bodies import ChatBody, base_request, parse_openai
from rollout.http.openai.call import (
    OpenAICall,
    finish_fields,
    start,
    token_writer,
    usage,
    version_fields,
)
from rollout.http.openai.chat_render import ChatRenderer
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.expand import check_text
from rollout.text.tokenizer import Tokenizer

# A character is at most six bytes of JSON; templates leave some of what comes out.
_BYTES_PER_CHAR = 8
_MORE_BYTES = 1 << 20


def router(services: Services) -> APIRouter:
    """The route."""
    routes, prompts = APIRouter(), chat_prompts(services)

    async def chat(request: Request) -> Response:
        return await answer(request, reply_to_chat(services, prompts, await request.body()))

    routes.add_api_route(
        "/v1/chat/completions", chat, methods=["POST"], openapi_extra=takes(ChatBody)
    )
    return routes


def chat_prompts(services: Services) -> ChatPrompts | None:
    """What renders conversations; None for a model without a tokenizer."""
    return None if services.tokenizer is None else ChatPrompts(services, services.tokenizer)


async def reply_to_chat(services: Services, prompts: ChatPrompts | None, data: bytes) -> Response:
    """The reply to one body. Raises the typed error that it is refused or fails with."""
    if prompts is not None:
        prompts.check_size(len(data))
    body = await services.generator.parsed(parse_openai, data, ChatBody)
    if prompts is None:
        raise InvalidRequest("this model has no tokenizer; send ids to /generate", field="messages")
    item = _item(services, body, await prompts.ids(body, len(data)))
    name = "chat.completion.chunk" if body.stream else "chat.completion"
    call = await start(services, body, [item], prefix="chatcmpl", object_name=name)
    writer = _ChatChoices(call, body)
    return EventStream(writer.frames()) if body.stream else await writer.reply()


def _item(services: Services, body: ChatBody, prompt_ids: list[int]) -> GenerateRequest:
    facts = services.engine.facts
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    base = base_request(
        body,
        max_tokens=facts.context_length if limit is None else limit,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        vocab_size=facts.vocab_size,
    )
    return msgspec.structs.replace(base, input_ids=prompt_ids)


class ChatPrompts:
    """From messages to ids, for every route that takes messages."""

    def __init__(self, services: Services, tokenizer: Tokenizer) -> None:
        trusted = services.config.trust_request_chat_template
        self._services = services
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer, trusted=trusted)

    def check_size(self, num_bytes: int) -> None:
        """Refuse, before it is decoded, a body far beyond what a context of text needs. Raises
        ContextTooLong (`messages`)."""
        most = _BYTES_PER_CHAR * self._max_chars() + _MORE_BYTES
        if num_bytes > most:
            raise ContextTooLong(
                f"the body has {num_bytes} bytes; the context of this model takes messages in "
                f"at most {most}",
                field="messages",
            )

    def _max_chars(self) -> int:
        facts = self._services.engine.facts
        return facts.context_length * self._tokenizer.longest_token_bytes

    async def ids(self, body: ChatBody, num_bytes: int) -> list[int]:
        """Ids of a conversation; num_bytes: of the body that it came in.

        Raises InvalidRequest for messages that the template cannot write or writes nothing for,
        ContextTooLong for text beyond the context, UnsupportedOption for a `tool_choice` that
        forces a call.
        """
        if body.tool_choice not in (None, "none", "auto"):
            raise UnsupportedOption(
                "tool_choice is 'none' or 'auto' here; a call cannot be forced",
                field="tool_choice",
            )
        tokenizer = self._tokenizer
        own = body.chat_template in (None, tokenizer.chat_template)
        context_length = self._services.engine.facts.context_length
        text = await self._renderer.render(
            body.messages,
            {
                "add_generation_prompt": body.add_generation_prompt,
                "tools": body.tools,
                **(body.chat_template_kwargs or {}),
            },
            source=None if own else body.chat_template,
            num_bytes=num_bytes,
            max_chars=self._max_chars(),
        )
        check_text(text, tokenizer, context_length, field="messages")
        ids = await self._services.generator.encoded(text)
        if not ids:
            raise InvalidRequest("the chat template wrote nothing", field="messages")
        return ids


class _ChatChoices:
    """Writes the choices of one call."""

    def __init__(self, call: OpenAICall, body: ChatBody) -> None:
        self._call = call
        self._body = body
        self._services = call.services
        self._writers = [token_writer(call, sample) for sample in call.samples]

    async def reply(self) -> Response:
        """Run to the end."""
        call = self._call
        choices = await call.choices(self._whole)
        more = {"usage": usage(call.samples), **self._prompt_fields()}
        return json_response(call.envelope(choices, **more))

    async def frames(self) -> AsyncGenerator[dict[str, Any], None]:
        """The role of every choice, then a frame for every output."""
        call = self._call
        prompt = self._prompt_fields()
        for index in range(len(call.samples)):
            opening = {"index": index, "delta": {"role": "assistant", "content": ""}}
            yield call.envelope([{**opening, "finish_reason": None}], **prompt)
        async with aclosing(call.outputs()) as outputs:
            async for index, sample, delta in outputs:
                yield call.envelope([self._part(index, sample, delta)])
        for frame in call.usage_frame():
            yield frame

    def _whole(self, sample: Sample, index: int) -> dict[str, Any]:
        content = sample.response().text
        return {
            "index": index,
            "message": {"role": "assistant", "content": content},
            **self._scores(index, sample.output),
            **finish_fields(sample.finish, self._body),
            **self._ids(sample.output),
            **version_fields(sample, self._services.labels),
        }

    def _part(self, index: int, sample: Sample, delta: SampleDelta) -> dict[str, Any]:
        finish = sample.finish if delta.finished else None
        choice = {
            "index": index,
            "delta": {"content": delta.text},
            **self._scores(index, delta.output),
            **finish_fields(finish, self._body),
            **self._ids(delta.output),
        }
        if delta.finished:
            choice |= version_fields(sample, self._services.labels)
        return choice

    def _scores(self, index: int, output: RequestOutput) -> dict[str, Any]:
        if not self._body.logprobs:
            return {"logprobs": None}
        count = self._call.num_likeliest(self._body.top_logprobs or 0)
        return {"logprobs": self._writers[index].chat(output, count)}

    def _ids(self, output: RequestOutput) -> dict[str, Any]:
        return {"token_ids": output.token_ids.tolist()} if self._body.return_token_ids else {}

    def _prompt_fields(self) -> dict[str, Any]:
        sample = self._call.samples[0]
        found: dict[str, Any] = {}
        if self._body.return_token_ids:
            found["prompt_token_ids"] = sample.request.prompt_ids.tolist()
        if self._body.prompt_logprobs is not None and sample.finish is not None:
            found["prompt_logprobs"] = self._call.prompt_scores(sample)
        return found
