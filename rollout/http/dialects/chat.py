"""POST /v1/chat/completions, with the fields that TRL reads (WIRE.md D1.7)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import GenerateRequest, RequestOutput
from rollout.http.dialects.openai_bodies import ChatBody, base_request, read_openai
from rollout.http.dialects.openai_logprobs import TokenText, chat_logprobs, prompt_logprobs
from rollout.http.dialects.openai_run import (
    OpenAICall,
    finish_fields,
    start,
    usage,
    version_fields,
)
from rollout.http.errors import json_response
from rollout.http.sample import Delta, Sample
from rollout.http.services import Services
from rollout.http.sse import EventStream, answer


def router(services: Services) -> APIRouter:
    """The route."""
    routes = APIRouter()

    async def chat(request: Request) -> Response:
        body = await read_openai(request, ChatBody)
        item = _item(services, body)
        name = "chat.completion.chunk" if body.stream else "chat.completion"
        call = await start(services, body, [item], prefix="chatcmpl", object_name=name)
        writer = _Choices(call, body)
        if body.stream:
            return EventStream(writer.frames())
        return await answer(request, writer.reply())

    routes.add_api_route("/v1/chat/completions", chat, methods=["POST"])
    return routes


def _item(services: Services, body: ChatBody) -> GenerateRequest:
    facts = services.engine.facts
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    base = base_request(
        body,
        max_tokens=facts.context_length if limit is None else limit,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        vocab_size=facts.vocab_size,
    )
    return msgspec.structs.replace(base, input_ids=_prompt_ids(services, body))


def _prompt_ids(services: Services, body: ChatBody) -> list[int]:
    tokenizer = services.tokenizer
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer; send ids to /generate", field="messages")
    if body.tool_choice not in (None, "none", "auto"):
        raise UnsupportedOption(
            "tool_choice is 'none' or 'auto' here; a call cannot be forced", field="tool_choice"
        )
    if body.chat_template is not None:
        tokenizer = tokenizer.with_template(body.chat_template)
    return tokenizer.apply_chat_template(
        [_plain(message, index) for index, message in enumerate(body.messages)],
        add_generation_prompt=body.add_generation_prompt,
        tools=body.tools,
        **(body.chat_template_kwargs or {}),
    )


def _plain(message: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """The message with content in text parts joined: templates are written for strings."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise UnsupportedOption(
                "content parts other than text are not served",
                field=f"messages[{index}].content",
            )
        texts.append(str(part.get("text", "")))
    return {**message, "content": "".join(texts)}


class _Choices:
    """Writes the choices of one call."""

    def __init__(self, call: OpenAICall, body: ChatBody) -> None:
        self._call = call
        self._body = body
        self._services = call.services
        as_ids = bool(body.return_tokens_as_token_ids)
        self._text = TokenText(tokenizer=call.services.tokenizer, as_ids=as_ids)

    async def reply(self) -> Response:
        """Run to the end."""
        call = self._call
        await self._services.generator.finish(call.samples)
        choices = [self._whole(index, sample) for index, sample in enumerate(call.samples)]
        more = {"usage": usage(call.samples), **self._prompt_fields()}
        return json_response(call.envelope(choices, **more))

    async def frames(self) -> AsyncGenerator[dict[str, Any], None]:
        """The role of every choice, then a frame for every output."""
        call = self._call
        prompt = self._prompt_fields()
        for index in range(len(call.samples)):
            opening = {"index": index, "delta": {"role": "assistant", "content": ""}}
            yield call.envelope([{**opening, "finish_reason": None}], **prompt)
        position = {id(sample): index for index, sample in enumerate(call.samples)}
        async with aclosing(self._services.generator.run(call.samples)) as outputs:
            async for sample, delta in outputs:
                yield call.envelope([self._part(position[id(sample)], sample, delta)])
        for frame in call.usage_frame():
            yield frame

    def _whole(self, index: int, sample: Sample) -> dict[str, Any]:
        content = sample.response().text
        return {
            "index": index,
            "message": {"role": "assistant", "content": content},
            **self._scores(sample.output),
            **finish_fields(sample.finish, self._body),
            **self._ids(sample.output),
            **version_fields(sample, self._services.labels),
        }

    def _part(self, index: int, sample: Sample, delta: Delta) -> dict[str, Any]:
        finish = sample.finish if delta.finished else None
        choice = {
            "index": index,
            "delta": {"content": delta.text},
            **self._scores(delta.output),
            **finish_fields(finish, self._body),
            **self._ids(delta.output),
        }
        if delta.finished:
            choice |= version_fields(sample, self._services.labels)
        return choice

    def _scores(self, output: RequestOutput) -> dict[str, Any]:
        if not self._body.logprobs:
            return {"logprobs": None}
        count = self._body.top_logprobs or 0
        count = self._services.engine.facts.vocab_size if count < 0 else count
        return {"logprobs": chat_logprobs(output, count, self._text)}

    def _ids(self, output: RequestOutput) -> dict[str, Any]:
        return {"token_ids": output.token_ids.tolist()} if self._body.return_token_ids else {}

    def _prompt_fields(self) -> dict[str, Any]:
        sample = self._call.samples[0]
        found: dict[str, Any] = {}
        if self._body.return_token_ids:
            found["prompt_token_ids"] = sample.request.prompt_ids.tolist()
        count = self._body.prompt_logprobs
        if count is not None and sample.finish is not None:
            count = self._services.engine.facts.vocab_size if count < 0 else count
            ids, tokenizer = sample.request.prompt_ids, self._services.tokenizer
            found["prompt_logprobs"] = prompt_logprobs(ids, sample.output, count, tokenizer)
        return found
