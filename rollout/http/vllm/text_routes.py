"""Routes between text and ids: /tokenize and /detokenize, in the forms of vLLM and SGLang, and
vLLM's /v1/chat/completions/render."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import msgspec
from fastapi import Request, Response
from msgspec import Meta

from engine.errors import ContextTooLong, InvalidRequest, UnsupportedOption
from engine.protocol.types import Count, Message
from rollout.http.chat.prompts import ChatPrompts
from rollout.http.chat.tool_choice import tool_choice
from rollout.http.edge.errors import json_response
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import answer
from rollout.http.native.generate_call import prompt_room
from rollout.http.native.long_prompts import check_long_prompt
from rollout.http.openai.bodies import ChatBody, parse_openai
from rollout.http.openai.model_routes import check_model
from rollout.http.openai.structured import grammar_of_body
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.expand import check_text, check_total
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
    """POST /tokenize with a text, or with several, as SGLang has it; with `messages`, the body is
    one of /v1/chat/completions, and may have `return_token_strs` too."""

    prompt: str | list[str]
    add_special_tokens: bool = True
    return_token_strs: bool | None = False
    model: Message | None = None


class _Strings(msgspec.Struct):
    """What /tokenize has beside the fields of /v1/chat/completions."""

    return_token_strs: bool | None = False


_OF_STRINGS = frozenset(_Strings.__struct_fields__)


class Detokenize(msgspec.Struct, kw_only=True):
    """POST /detokenize: ids, or as SGLang has it a list of lists of them. skip_special_tokens: off
    as in vLLM, which has no such field; SGLang's default is on."""

    tokens: Annotated[list[Count | list[Count]], Meta(max_length=1 << 24)]
    skip_special_tokens: bool = False
    model: Message | None = None


def _read_detokenize(data: bytes) -> Detokenize:
    body: Detokenize = decode_json(data or b"{}", Detokenize, strict=False)
    return body


class _Text:
    """The handlers."""

    def __init__(self, services: Services, prompts: ChatPrompts) -> None:
        self._services = services
        self._tokenizer = prompts.tokenizer
        self._prompts = prompts

    async def tokenize(self, request: Request) -> Response:
        return await answer(request, self._tokenize(await request.body()))

    def _check_long(self, data: bytes) -> None:
        room = prompt_room(self._services.engine.facts, self._tokenizer)
        check_long_prompt(data, text_bytes=room.text_bytes, num_ids=room.num_ids)

    async def _tokenize(self, data: bytes) -> Response:
        self._check_long(data)
        fields: dict[str, msgspec.Raw] = decode_json(data or b"{}", dict[str, msgspec.Raw])
        fields = {name: value for name, value in fields.items() if bytes(value) != b"null"}
        if "messages" in fields:
            own = {name: fields.pop(name) for name in _OF_STRINGS & fields.keys()}
            shown: _Strings = decode_json(msgspec.json.encode(own), _Strings, strict=False)
            chat = await self._chat(msgspec.json.encode(fields))
            ids = (await self._prompts.prompt(chat, len(data))).ids
            return self._ids(ids, strings=bool(shown.return_token_strs))
        body: Tokenize = decode_json(data or b"{}", Tokenize, strict=False)
        check_model(self._services, body.model or "")
        facts, several = self._services.engine.facts, isinstance(body.prompt, list)
        texts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        check_total(len(texts), facts, field="prompt")
        for text in texts:
            check_text(text, self._tokenizer, facts.context_length, field="prompt")
        found = [
            await self._services.generator.workers.run(
                self._tokenizer.encode, text, add_special_tokens=body.add_special_tokens
            )
            for text in texts
        ]
        strings = bool(body.return_token_strs)
        return self._lists(found, strings) if several else self._ids(found[0], strings=strings)

    async def detokenize(self, request: Request) -> Response:
        return await answer(request, self._detokenize(await request.body()))

    async def _detokenize(self, data: bytes) -> Response:
        self._check_long(data)
        body = await self._services.generator.parsed(_read_detokenize, data)
        check_model(self._services, body.model or "")
        workers = self._services.generator.workers
        lists = await workers.run(self._id_lists, body.tokens)
        found = [
            await workers.run(
                self._tokenizer.decode, ids, skip_special_tokens=body.skip_special_tokens
            )
            for ids in lists
        ]
        several = bool(body.tokens) and isinstance(body.tokens[0], list)
        text = found if several else found[0]
        # vLLM's name of it, and SGLang's.
        return json_response({"prompt": text, "text": text})

    def _id_lists(self, tokens: list[int | list[int]]) -> list[list[int]]:
        """The lists of ids in `tokens`, or the one that it is. Raises InvalidRequest (`tokens`)."""
        facts = self._services.engine.facts
        lists = [ids for ids in tokens if isinstance(ids, list)]
        plain = [token for token in tokens if not isinstance(token, list)]
        if lists and plain:
            raise InvalidRequest("tokens mixes ids and lists of ids; send either", field="tokens")
        check_total(len(lists), facts, field="tokens")
        found = lists or [plain]
        for ids in found:
            if len(ids) > facts.context_length:
                raise ContextTooLong(
                    f"tokens has {len(ids)} ids, more than the context of {facts.context_length}",
                    field="tokens",
                )
            if ids and (largest := max(ids)) >= facts.vocab_size:
                raise InvalidRequest(
                    f"tokens [{ids.index(largest)}] is {largest}; ids must lie in "
                    f"[0, {facts.vocab_size})",
                    field="tokens",
                )
        return found

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
        return json_response(
            {
                "count": len(ids),
                "max_model_len": self._services.engine.facts.context_length,
                "tokens": ids,
                "token_strs": self._strings(ids) if strings else None,
            }
        )

    def _lists(self, found: list[list[int]], strings: bool) -> Response:
        return json_response(
            {
                "count": [len(ids) for ids in found],
                "max_model_len": self._services.engine.facts.context_length,
                "tokens": found,
                "token_strs": [self._strings(ids) for ids in found] if strings else None,
            }
        )

    def _strings(self, ids: list[int]) -> list[str]:
        # As logprobs write them: part of a character, or a leading space, shows.
        return [spelled(self._tokenizer.token_bytes(token)) for token in ids]


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


def router(services: Services) -> Routes:
    """The routes; a model without a tokenizer refuses them."""
    routes = Routes()
    text = None if services.prompts is None else _Text(services, services.prompts)

    async def refuse(_: Request) -> Response:
        raise InvalidRequest("this model came without a tokenizer: send ids", field="prompt")

    tokenize, detokenize = (text.tokenize, text.detokenize) if text else (refuse, refuse)
    for path, handler, reads in (
        ("/tokenize", tokenize, takes(Tokenize)),
        ("/v1/tokenize", tokenize, takes(Tokenize)),
        ("/detokenize", detokenize, takes(Detokenize)),
        ("/v1/detokenize", detokenize, takes(Detokenize)),
        ("/v1/chat/completions/render", text.render if text else refuse, takes(ChatBody)),
    ):
        routes.add_api_route(path, handler, methods=["POST"], openapi_extra=reads)
    return routes
