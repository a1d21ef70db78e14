"""POST /v1/responses, and the routes of responses that are kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import Request, Response
from msgspec import Meta

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol.types import Int64, Name
from rollout.http.chat.conversation import translating
from rollout.http.chat.turn import Turn, start_turn
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import read_query
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import NAMED, EventStream, answer
from rollout.http.openai.model_routes import check_model
from rollout.http.openai.responses.bodies import (
    NAMES,
    ResponsesBody,
    chat_body,
    input_items,
    parse_responses,
)
from rollout.http.openai.responses.input_items import Items, to_messages
from rollout.http.openai.responses.reply import ResponseWriter
from rollout.http.openai.responses.store import ResponseStore
from rollout.http.openapi import takes
from rollout.http.services import Services

_ID = "response_id"


class _Page(msgspec.Struct):
    """Query of the list of input items."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: Name | None = None


class _Retrieve(msgspec.Struct):
    """Query of a response that is kept."""

    stream: bool = False
    starting_after: Int64 | None = None


def router(services: Services, store: ResponseStore) -> Routes:
    """The routes. store: of this server's responses."""
    routes = Routes()
    calls = _Responses(services, store)

    async def create(request: Request) -> Response:
        return await answer(request, calls.create(await request.body()))

    async def count(request: Request) -> Response:
        return await answer(request, calls.count(await request.body()))

    async def retrieve(request: Request) -> Response:
        query = read_query(request, _Retrieve)
        if query.stream or query.starting_after is not None:
            raise UnsupportedOption(
                "a response that is over is not streamed again; leave stream out", field="stream"
            )
        body = store.get(request.path_params[_ID]).body
        return Response(body, media_type="application/json")

    async def delete(request: Request) -> Response:
        name = request.path_params[_ID]
        store.get(name)
        store.discard(name)
        return json_response({"id": name, "object": "response", "deleted": True})

    async def list_input(request: Request) -> Response:
        page = read_query(request, _Page)
        return json_response(_page(store.get(request.path_params[_ID]).input, page))

    async def cancel(request: Request) -> Response:
        store.get(request.path_params[_ID])
        raise UnsupportedOption(
            "only responses in the background can be cancelled, which are not served here; close "
            "the connection of a response that runs",
            field="background",
        )

    one = f"/v1/responses/{{{_ID}}}"
    for path, handler, method, reads in (
        ("/v1/responses", create, "POST", takes(ResponsesBody)),
        ("/v1/responses/input_tokens", count, "POST", takes(ResponsesBody)),
        (one, retrieve, "GET", takes(query=_Retrieve)),
        (one, delete, "DELETE", takes()),
        (f"{one}/input_items", list_input, "GET", takes(query=_Page)),
        (f"{one}/cancel", cancel, "POST", takes()),
    ):
        routes.add_api_route(path, handler, methods=[method], openapi_extra=reads)
    return routes


async def reply_to_response(services: Services, store: ResponseStore, data: bytes) -> Response:
    """The reply to one body, which may go on from what `store` has, and is kept there. Raises the
    typed error that it is refused or fails with."""
    return await _Responses(services, store).create(data)


class _Responses:
    """Calls that are responses, and the store that they go on from."""

    def __init__(self, services: Services, store: ResponseStore) -> None:
        self._services = services
        self._store = store

    async def create(self, data: bytes) -> Response:
        """The reply to one body."""
        body = await self._parsed(data)
        before = self._store.conversation(body.previous_response_id)
        turn = await self._started(body, before, len(data))
        own = [_as_kept(item, number) for number, item in enumerate(input_items(body))]

        def keep(name: str, response: dict[str, Any]) -> None:
            self._store.add(name, response, own, before)

        writer = ResponseWriter(turn, body, keep)
        if body.stream:
            return EventStream(writer.frames(), NAMED)
        return json_response(await writer.reply())

    async def count(self, data: bytes) -> Response:
        """How many tokens the prompt of a body has."""
        body = await self._parsed(data)
        check_model(self._services, body.model)
        prompts = self._services.prompts
        if prompts is None:
            raise InvalidRequest("this model has no tokenizer", field="input")
        before = self._store.conversation(body.previous_response_id)
        conversation = to_messages(body.instructions, before, input_items(body))
        with translating(NAMES, conversation):
            prompt = await prompts.prompt(chat_body(body, conversation.messages), len(data))
        return json_response({"object": "response.input_tokens", "input_tokens": len(prompt.ids)})

    async def _parsed(self, data: bytes) -> ResponsesBody:
        services = self._services
        if services.prompts is not None:
            services.prompts.check_size(len(data), "input")
        return await services.generator.parsed(parse_responses, data)

    async def _started(self, body: ResponsesBody, before: Items, num_bytes: int) -> Turn:
        services = self._services
        conversation = to_messages(body.instructions, before, input_items(body))
        chat = chat_body(body, conversation.messages)
        with translating(NAMES, conversation):
            turn = await start_turn(
                services, services.prompts, chat, num_bytes, prefix="resp_", object_name="response"
            )
        if chat.logprobs and not turn.is_plain:
            raise UnsupportedOption(
                "include has logprobs, which are not told apart where a reply may hold reasoning "
                "or calls; ask /v1/chat/completions",
                field="include",
            )
        return turn


def _as_kept(item: dict[str, Any], number: int) -> dict[str, Any]:
    """An item with its type and an id, that of its place if it came without."""
    return {"type": "message", "id": f"item_{number}", **item}


def _page(items: Items, page: _Page) -> dict[str, Any]:
    """Some of the items."""
    found = list(items) if page.order == "asc" else list(reversed(items))
    if page.after is not None:
        places = [index for index, item in enumerate(found) if item["id"] == page.after]
        if not places:
            raise InvalidRequest(
                f"after is {page.after[:200]!r}, which is no item of this response", field="after"
            )
        found = found[places[0] + 1 :]
    data = found[: page.limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > len(data),
    }
