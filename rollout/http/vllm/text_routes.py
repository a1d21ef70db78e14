"""vLLM's routes between text and ids: /tokenize, /detokenize and /v1/chat/completions/render."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Meta

from engine.errors import ContextTooLong, InvalidRequest, UnsupportedOption
from engine.protocol.types import Count, Message
from rollout.http.chat.prompts import ChatPrompts
from rollout.http.chat.tool_choice import tool_choice
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import read_body
from rollout.http.edge.sse import answer
from rollout.http.openai.bodies import ChatBody, parse_openai
from rollout.http.openai.model_routes import check_model
from rollout.http.openai.structured import grammar_of_body
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.expand import check_text
from rollout.requests.json_types import decode_json
from rollout.text.token_bytes import spelled

# Of a chat body: what /inference/v1/generate takes under the same name.
_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "prompt_logprobs",
)


class Tokenize(msgspec.Struct, kw_only=True):
    """POST /tokenize with a text; with `messages`, the body is one of /v1/chat/completions."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False
    model: Message | None = None


class Detokenize(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: Annotated[list[Count], Meta(max_length=1 << 24)]
    model: Message | None = None


class _Text:
    """The handlers."""

    def __init__(self, services: Services, prompts: ChatPrompts) -> None:
        self._services = services
        self._tokenizer = prompts.tokenizer
        self._prompts = prompts

    async def tokenize(self, request: Request) -> Response:
        return await answer(request, self._tokenize(await request.body()))

    async def _tokenize(self, data: bytes) -> Response:
        fields: dict[str, msgspec.Raw] = decode_json(data or b"{}", dict[str, msgspec.Raw])
        fields = {name: value for name, value in fields.items() if bytes(value) != b"null"}
        if "messages" in fields:
            chat = await self._chat(data)
            return self._ids((await self._prompts.prompt(chat, len(data))).ids, strings=False)
        body: Tokenize = decode_json(data or b"{}", Tokenize, strict=False)
        check_model(self._services, body.model or "")
        context = self._services.engine.facts.context_length
        check_text(body.prompt, self._tokenizer, context, field="prompt")
        ids = await self._services.generator.workers.run(
            self._tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens
        )
        return self._ids(ids, strings=bool(body.return_token_strs))

    async def detokenize(self, request: Request) -> Response:
        body = await read_body(request, Detokenize)
        check_model(self._services, body.model or "")
        facts = self._services.engine.facts
        if len(body.tokens) > facts.context_length:
            raise ContextTooLong(
                f"tokens has {len(body.tokens)} ids, more than the context of "
                f"{facts.context_length}",
                field="tokens",
            )
        for index, token in enumerate(body.tokens):
            if token >= facts.vocab_size:
                raise InvalidRequest(
                    f"tokens [{index}] is {token}; ids must lie in [0, {facts.vocab_size})",
                    field="tokens",
                )
        return await answer(request, self._detokenize(body))

    async def _detokenize(self, body: Detokenize) -> Response:
        text = await self._services.generator.workers.run(
            self._tokenizer.decode, body.tokens, skip_special_tokens=False
        )
        return json_response({"prompt": text})

    async def render(self, request: Request) -> Response:
        return await answer(request, self._render(await request.body()))

    async def _render(self, data: bytes) -> Response:
        body = await self._chat(data)
        _check_free(body)
        ids = (await self._prompts.prompt(body, len(data))).ids
        return json_response(
            {
                "request_id": body.request_id or f"render-{uuid.uuid4().hex}",
                "token_ids": ids,
                "features": None,
                "sampling_params": self._sampling(body, len(ids)),
                "model": self._services.config.model_name,
                "stream": body.stream,
                "cache_salt": body.cache_salt,
                "priority": body.priority,
            }
        )

    async def _chat(self, data: bytes) -> ChatBody:
        self._prompts.check_size(len(data))
        body = await self._services.generator.parsed(parse_openai, data, ChatBody)
        check_model(self._services, body.model)
        return body

    def _sampling(self, body: ChatBody, num_prompt: int) -> dict[str, Any]:
        limit = body.max_completion_tokens
        limit = body.max_tokens if limit is None else limit
        room = self._services.engine.facts.context_length - num_prompt
        return {
            **{name: getattr(body, name) for name in _SAMPLING},
            "max_tokens": room if limit is None else limit,
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        }

    def _ids(self, ids: list[int], *, strings: bool) -> Response:
        # As logprobs write them: part of a character, or a leading space, shows.
        raw = self._tokenizer.token_bytes
        texts = [spelled(raw(token)) for token in ids] if strings else None
        return json_response(
            {
                "count": len(ids),
                "max_model_len": self._services.engine.facts.context_length,
                "tokens": ids,
                "token_strs": texts,
            }
        )


def _check_free(body: ChatBody) -> None:
    """Refuse what the ids of a prompt, and its sampling parameters, cannot say of the reply."""
    if tool_choice(body).forced:
        raise UnsupportedOption(
            "tool_choice is 'none' or 'auto' here: ids force no call", field="tool_choice"
        )
    if (named := grammar_of_body(body)) is not None:
        raise UnsupportedOption(
            f"{named[0]} is not served here: ids have no format", field=named[0]
        )


def router(services: Services) -> APIRouter:
    """The routes; a model without a tokenizer refuses them."""
    routes = APIRouter()
    text = None if services.prompts is None else _Text(services, services.prompts)

    async def refuse(_: Request) -> Response:
        raise InvalidRequest("this model came without a tokenizer: send ids", field="prompt")

    for path, handler, reads in (
        ("/tokenize", text.tokenize if text else refuse, takes(Tokenize)),
        ("/detokenize", text.detokenize if text else refuse, takes(Detokenize)),
        ("/v1/chat/completions/render", text.render if text else refuse, takes(ChatBody)),
    ):
        routes.add_api_route(path, handler, methods=["POST"], openapi_extra=reads)
    return routes
