"""POST /v1/rerank, /v2/rerank and /rerank: documents by how well they fit a query.

The forms are those of Jina and Cohere, which agree in what is served here.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from engine.errors import InvalidRequest
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import whole_body
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import answer
from rollout.http.openai.bodies import parse_openai
from rollout.http.openapi import takes
from rollout.http.scoring.bodies import RerankBody
from rollout.http.scoring.pairs import Pairs, score_pairs
from rollout.http.services import Services

PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")


def router(services: Services) -> Routes:
    """The routes."""
    routes = Routes()

    async def rerank(request: Request) -> Response:
        return await answer(request, run(await whole_body(request)))

    async def run(data: bytes) -> Response:
        body = await services.generator.parsed(parse_openai, data, RerankBody)
        texts = [one if isinstance(one, str) else one.text for one in body.documents]
        _check(body, len(texts))
        pairs = Pairs(firsts=[body.query], seconds=texts, names=("query", "documents"))
        scores, call = await score_pairs(services, body, pairs, prefix="rerank")
        reply = {
            "id": call.id,
            "model": services.config.model_name,
            "results": _results(body, texts, scores),
            "usage": call.usage(),
            "weight_versions": list(dict.fromkeys(call.versions())),
        }
        return json_response(reply)

    for path in PATHS:
        routes.add_api_route(path, rerank, methods=["POST"], openapi_extra=takes(RerankBody))
    return routes


def _check(body: RerankBody, count: int) -> None:
    if count == 0:
        raise InvalidRequest("documents is empty; send at least one", field="documents")
    if body.top_n is not None and body.top_n < 0:
        raise InvalidRequest(f"top_n is {body.top_n}; give 0 or more", field="top_n")


def _results(body: RerankBody, texts: list[str], scores: list[float]) -> list[dict[str, Any]]:
    """The best first; of equal ones, that which came first."""
    order = sorted(range(len(texts)), key=lambda index: -scores[index])
    found = []
    for index in order[: body.top_n or None]:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            result["document"] = {"text": texts[index]}
        found.append(result)
    return found
