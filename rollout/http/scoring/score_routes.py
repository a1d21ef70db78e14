"""POST /v1/score and /score: of pairs as vLLM has it, of labels as SGLang has it."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request, Response

from engine.errors import InvalidRequest
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import whole_body
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import answer
from rollout.http.openai.bodies import parse_openai
from rollout.http.openapi import takes
from rollout.http.scoring.bodies import LabelBody, PairBody
from rollout.http.scoring.label_scores import score_labels
from rollout.http.scoring.pairs import Pairs, score_pairs
from rollout.http.services import Services
from rollout.requests.json_types import decode_json

PATHS = ("/v1/score", "/score")


def router(services: Services) -> Routes:
    """The routes."""
    routes = Routes()

    async def score(request: Request) -> Response:
        return await answer(request, run(await whole_body(request)))

    async def run(data: bytes) -> Response:
        body = await services.generator.parsed(_parse, data)
        if isinstance(body, LabelBody):
            return await score_labels(services, body)
        found = await score_pairs(services, body, _pairs(body), prefix="score")
        data_ = [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(found.scores)
        ]
        return json_response(found.call.reply(data_))

    for path in PATHS:
        routes.add_api_route(
            path, score, methods=["POST"], openapi_extra=takes((PairBody, LabelBody))
        )
    return routes


def _parse(data: bytes) -> PairBody | LabelBody:
    """The body, of the kind whose fields it has."""
    fields: dict[str, Any] = decode_json(data or b"{}", dict[str, msgspec.Raw])
    is_label = not {"text_1", "text_2"} & fields.keys() and {"query", "items"} & fields.keys()
    return parse_openai(data, LabelBody) if is_label else parse_openai(data, PairBody)


def _pairs(body: PairBody) -> Pairs:
    firsts, seconds = (
        [text] if isinstance(text, str) else text for text in (body.text_1, body.text_2)
    )
    if len(seconds) == 0 or len(firsts) not in (1, len(seconds)):
        raise InvalidRequest(
            f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}; send one and any number, "
            "or as many of both",
            field="text_2",
        )
    return Pairs(firsts=firsts, seconds=seconds, names=("text_1", "text_2"))
