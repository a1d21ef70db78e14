"""POST /v1/chat/completions, with the fields that TRL reads (docs/openai.md)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from engine.protocol import RequestOutput
from rollout.http.chat.prompts import ChatPrompts
from rollout.http.chat.turn import Turn, TurnDelta, start_turn
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import whole_body
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import EventStream, answer
from rollout.http.native.sample import Sample
from rollout.http.openai.bodies import ChatBody, parse_openai
from rollout.http.openai.call import (
    finish_fields,
    route_fields,
    token_writer,
    usage,
    version_fields,
)
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.parsers.events import (
    CallArguments,
    CallBegin,
    CallBroken,
    Content,
    Event,
    Reasoning,
    Reply,
)


def router(services: Services) -> Routes:
    """The route."""
    routes = Routes()

    async def chat(request: Request) -> Response:
        data = await whole_body(request)
        return await answer(request, reply_to_chat(services, services.prompts, data))

    routes.add_api_route(
        "/v1/chat/completions", chat, methods=["POST"], openapi_extra=takes(ChatBody)
    )
    return routes


async def reply_to_chat(services: Services, prompts: ChatPrompts | None, data: bytes) -> Response:
    """The reply to one body. Raises the typed error that it is refused or fails with."""
    if prompts is not None:
        prompts.check_size(len(data))
    body = await services.generator.parsed(parse_openai, data, ChatBody)
    name = "chat.completion.chunk" if body.stream else "chat.completion"
    turn = await start_turn(
        services, prompts, body, len(data), prefix="chatcmpl-", object_name=name
    )
    writer = _ChatChoices(turn, body)
    return EventStream(writer.frames()) if body.stream else await writer.reply()


class _ChatChoices:
    """Writes the choices of one call."""

    def __init__(self, turn: Turn, body: ChatBody) -> None:
        self._turn = turn
        self._call = turn.call
        self._body = body
        self._services = turn.call.services
        self._writers = [token_writer(turn.call, sample) for sample in turn.call.samples]

    async def reply(self) -> Response:
        """Run to the end."""
        call = self._call
        await self._turn.finish()
        choices = [
            await self._services.generator.written(self._whole, sample, index)
            for index, sample in enumerate(call.samples)
        ]
        return json_response(call.envelope(choices, usage=self._usage(), **self._prompt_fields()))

    async def frames(self) -> AsyncGenerator[dict[str, Any], None]:
        """The role of every choice, then frames for every output."""
        call = self._call
        prompt = self._prompt_fields()
        for index in range(len(call.samples)):
            opening = {"index": index, "delta": {"role": "assistant", "content": ""}}
            yield call.envelope([{**opening, "finish_reason": None}], **prompt)
        async with aclosing(self._turn.deltas()) as deltas:
            async for delta in deltas:
                for part in self._parts(delta):
                    yield call.envelope([part])
        if call.usage_frame():
            yield call.envelope([], usage=self._usage())

    def _whole(self, sample: Sample, index: int) -> dict[str, Any]:
        reply = self._turn.reply(index)
        return {
            "index": index,
            "message": _message(reply),
            **self._scores(index, sample.output),
            **self._finish(sample, reply),
            **self._ids(sample.output),
            **version_fields(sample, self._services.labels),
            **route_fields(sample, self._body),
        }

    def _parts(self, found: TurnDelta) -> Iterator[dict[str, Any]]:
        """The frames of one output. Its scores and ids come with the first, its end with the
        last."""
        index, output = found.index, found.delta.output
        deltas = list(_chat_deltas(found.events)) or [{"content": ""}]
        for number, delta in enumerate(deltas):
            choice = {"index": index, "delta": delta, "logprobs": None}
            if number == 0:
                choice |= self._scores(index, output) | self._ids(output)
            if found.delta.finished and number == len(deltas) - 1:
                choice |= self._finish(found.sample, self._turn.reply(index))
                choice |= version_fields(found.sample, self._services.labels)
                choice |= route_fields(found.sample, self._body)
            else:
                choice |= finish_fields(None, self._body)
            yield choice

    def _finish(self, sample: Sample, reply: Reply) -> dict[str, Any]:
        fields = finish_fields(sample.finish, self._body)
        if fields["finish_reason"] == "stop" and reply.calls:
            fields["finish_reason"] = "tool_calls"
        return fields

    def _scores(self, index: int, output: RequestOutput) -> dict[str, Any]:
        if not self._body.logprobs:
            return {"logprobs": None}
        count = self._call.num_likeliest(self._body.top_logprobs or 0)
        return {"logprobs": self._writers[index].chat(output, count)}

    def _ids(self, output: RequestOutput) -> dict[str, Any]:
        return {"token_ids": output.token_ids.tolist()} if self._body.return_token_ids else {}

    def _usage(self) -> dict[str, Any]:
        found = usage(self._call.samples)
        if num_reasoning := self._turn.num_reasoning_tokens():
            found["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
        return found

    def _prompt_fields(self) -> dict[str, Any]:
        sample = self._call.samples[0]
        found: dict[str, Any] = {}
        if self._body.return_token_ids:
            found["prompt_token_ids"] = sample.request.prompt_ids.tolist()
        if self._body.prompt_logprobs is not None and sample.finish is not None:
            found["prompt_logprobs"] = self._call.prompt_scores(sample)
        return found


def _message(reply: Reply) -> dict[str, Any]:
    """A whole reply. Content is null beside calls where there is none; reasoning is under the
    names that clients of SGLang and of vLLM read."""
    content = reply.content or (None if reply.calls else "")
    found: dict[str, Any] = {"role": "assistant", "content": content}
    if reply.reasoning:
        found |= _reasoning(reply.reasoning)
    if reply.calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in reply.calls
        ]
    return found


def _chat_deltas(events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """The deltas of some events, one for each: a call begins with its id and name, and pieces of
    its arguments follow."""
    for event in events:
        match event:
            case Content(text=text):
                yield {"content": text}
            case Reasoning(text=text):
                yield _reasoning(text)
            case CallBegin(index=index, id=call_id, name=name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                yield {"tool_calls": [call]}
            case CallArguments(index=index, text=text):
                yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case CallBroken(text=text):
                yield {"content": text}


def _reasoning(text: str) -> dict[str, Any]:
    return {"reasoning_content": text, "reasoning": text}
