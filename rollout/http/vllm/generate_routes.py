"""POST /inference/v1/generate: vLLM's route of ids in, ids out, which prime-rl, SkyRL and TRL call.

A body is `token_ids` and `sampling_params`, whose names are those of /v1/completions; it becomes
such a body, so that both routes check, refuse and sample alike. Replies have no text: tokens are
`token_ids`, and `token_id:N` in logprobs.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import Request, Response

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import GenerateRequest, RequestOutput
from engine.protocol.types import ClientId, Int64, Message, Salt
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import read_query, whole_body
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import EventStream, answer
from rollout.http.native.generate_call import check_prompt, prompt_room
from rollout.http.native.long_prompts import check_long_prompt
from rollout.http.native.sample import Sample, SampleDelta
from rollout.http.openai.bodies import (
    CompletionBody,
    StreamOptions,
    base_request,
    parse_openai,
    prompts_of,
)
from rollout.http.openai.call import (
    OpenAICall,
    finish_fields,
    route_fields,
    start,
    usage,
    version_fields,
)
from rollout.http.openai.logprobs import TokenWriter
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.json_types import decode_json
from rollout.requests.known_fields import WITHOUT_EFFECT

_DEFAULT_TOKENS = 16
_INERT = frozenset({b"null", b"false", b'""', b"[]", b"{}"})
# Fields of a body that stand beside the sampling parameters, here as in /v1/completions.
_BESIDE = (
    *("model", "request_id", "stream", "stream_options", "cache_salt", "priority"),
    "return_routed_experts",
)
# Fields of /v1/completions that are no sampling parameters here.
_ELSEWHERE = frozenset({"prompt", "echo", *_BESIDE})


class TokensBody(msgspec.Struct, kw_only=True):
    """POST /inference/v1/generate. sampling_params: names, defaults and ranges are those of
    /v1/completions."""

    token_ids: msgspec.Raw
    sampling_params: dict[str, msgspec.Raw] = {}
    model: Message | None = None
    request_id: ClientId | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Salt | None = None
    priority: Int64 | None = None
    return_token_ids: bool | None = None
    return_routed_experts: bool | None = None
    """Where an engine keeps routes, this route returns them unless told not to, as vLLM's does."""


class _Session(msgspec.Struct):
    """What SkyRL tells a router when a trajectory is over."""

    session_id: ClientId = ""


def router(services: Services) -> Routes:
    """The routes."""
    routes = Routes()

    async def generate(request: Request) -> Response:
        return await answer(request, reply_to_tokens(services, await whole_body(request)))

    async def finish_session(request: Request) -> Response:
        # Nothing is held for a session: its prefix stays cached for as long as there is room.
        read_query(request, _Session)
        return json_response({"status": "ok"})

    for path, handler, reads in (
        ("/inference/v1/generate", generate, takes(TokensBody)),
        ("/finish_session", finish_session, takes(query=_Session)),
    ):
        routes.add_api_route(path, handler, methods=["POST"], openapi_extra=reads)
    return routes


async def reply_to_tokens(services: Services, data: bytes) -> Response:
    """The reply to one body. Raises the typed error that it is refused or fails with."""
    try:
        return await _reply(services, data)
    except InvalidRequest as error:
        if error.field != "prompt":
            raise
        # What /v1/completions calls the ids.
        raise type(error)(error.message, field="token_ids") from error


async def _reply(services: Services, data: bytes) -> Response:
    facts = services.engine.facts
    room = prompt_room(facts, services.tokenizer)
    check_long_prompt(data, text_bytes=room.text_bytes, num_ids=room.num_ids)
    body = await services.generator.parsed(_parse_tokens, data)
    check_prompt(body.prompt, room, "token_ids")
    if body.return_routed_experts is None:
        body.return_routed_experts = facts.keeps_routes
    item = _item(services, body, _ids(await services.generator.parsed(prompts_of, body.prompt)))
    call = await start(services, body, [item], prefix="generate-", object_name="generate")
    writer = _TokenChoices(call, body)
    return EventStream(writer.frames()) if body.stream else await writer.reply()


def _parse_tokens(data: bytes) -> CompletionBody:
    """The body, as one of /v1/completions. Raises InvalidRequest naming the field, and
    UnsupportedOption for an option of the dialect that is set and not served."""
    body: TokensBody = decode_json(data or b"{}", TokensBody, strict=False)
    fields: dict[str, msgspec.Raw] = decode_json(data or b"{}", dict[str, msgspec.Raw])
    known = frozenset(TokensBody.__struct_fields__)
    for name, value in fields.items():
        if name not in known and bytes(value) not in _INERT:
            raise UnsupportedOption(
                f"{name} is not served by this engine; leave it out", field=name
            )
    merged = {name: fields[name] for name in _BESIDE if name in fields}
    for name, value in body.sampling_params.items():
        if name not in _ELSEWHERE:
            merged |= {} if name in WITHOUT_EFFECT["tokens"] else {name: value}
        elif bytes(value) not in _INERT:
            raise InvalidRequest(
                f"{name} is no sampling parameter", field=f"sampling_params.{name}"
            )
    merged = {name: value for name, value in merged.items() if bytes(value) != b"null"}
    merged["prompt"] = body.token_ids
    return parse_openai(msgspec.json.encode(merged), CompletionBody)


def _ids(prompts: list[str] | list[list[int]]) -> list[int]:
    if len(prompts) != 1 or isinstance(prompts[0], str):
        raise InvalidRequest("token_ids must be one list of token ids", field="token_ids")
    return prompts[0]


def _item(services: Services, body: CompletionBody, ids: list[int]) -> GenerateRequest:
    if body.best_of not in (None, body.n):
        raise UnsupportedOption(
            "best_of is not served here; leave it out or equal to n", field="best_of"
        )
    base = base_request(
        body,
        max_tokens=_DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens,
        top_logprobs=body.logprobs,
        vocab_size=services.engine.facts.vocab_size,
    )
    return msgspec.structs.replace(base, input_ids=ids)


class _TokenChoices:
    """Writes the choices of one call."""

    def __init__(self, call: OpenAICall, body: CompletionBody) -> None:
        self._call = call
        self._body = body
        self._services = call.services
        self._writer = TokenWriter(None, as_ids=True, skip_special_tokens=False)

    async def reply(self) -> Response:
        """Run to the end."""
        call = self._call
        choices = await call.choices(self._whole)
        scores = call.prompt_scores(call.samples[0])
        more = {"usage": usage(call.samples), "prompt_logprobs": scores}
        return json_response({**self._envelope(choices), **more})

    async def frames(self) -> AsyncGenerator[dict[str, Any], None]:
        """A frame for every output."""
        call = self._call
        async with aclosing(call.outputs()) as outputs:
            async for index, sample, delta in outputs:
                yield self._envelope([self._part(index, sample, delta)])
        if call.usage_frame():
            yield {**self._envelope([]), "usage": usage(call.samples)}

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = self._services.config.model_name
        return {"request_id": self._call.call.prefix, "model": name, "choices": choices}

    def _whole(self, sample: Sample, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "token_ids": sample.output.token_ids.tolist(),
            **self._scores(sample.output),
            **finish_fields(sample.finish, self._body),
            **version_fields(sample, self._services.labels),
            **route_fields(sample, self._body),
        }

    def _part(self, index: int, sample: Sample, delta: SampleDelta) -> dict[str, Any]:
        choice = {
            "index": index,
            "token_ids": delta.output.token_ids.tolist(),
            **self._scores(delta.output),
            **finish_fields(sample.finish if delta.finished else None, self._body),
        }
        if delta.finished:
            choice |= version_fields(sample, self._services.labels)
            choice |= route_fields(sample, self._body)
        return choice

    def _scores(self, output: RequestOutput) -> dict[str, Any]:
        if self._body.logprobs is None:
            return {"logprobs": None}
        return {
            "logprobs": self._writer.chat(output, self._call.num_likeliest(self._body.logprobs))
        }
