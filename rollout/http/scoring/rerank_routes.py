"""POST /v1/rerank, /v2/rerank and /rerank: documents by how well they fit a query.

Bodies of Jina, Cohere and SGLang agree in what is served here, and their replies do not: Jina's and
Cohere's are an object with `results`, SGLang's server gives a bare list. The server is told which
(`--rerank-form`), or the body says so; /v2/rerank is Cohere's alone.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from engine.errors import InvalidRequest
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import whole_body
from rollout.http.edge.routes import Handler, Routes
from rollout.http.edge.sse import answer
from rollout.http.openai.bodies import parse_openai
from rollout.http.openapi import takes
from rollout.http.scoring.bodies import RerankBody
from rollout.http.scoring.native_form import native_meta
from rollout.http.scoring.pairs import Pairs, Scored, score_pairs
from rollout.http.services import Services

PATHS = ("/v1/rerank", "/rerank")
_COHERES = "/v2/rerank"


def router(services: Services) -> Routes:
    """The routes."""
    routes = Routes()

    def reply_in(default: str) -> Handler:
        async def rerank(request: Request) -> Response:
            return await answer(request, _rerank(services, await whole_body(request), default))

        return rerank

    reads, methods = takes(RerankBody), ["POST", "PUT"]
    for path in PATHS:
        handler = reply_in(services.config.rerank_form)
        routes.add_api_route(path, handler, methods=methods, openapi_extra=reads)
    routes.add_api_route(_COHERES, reply_in("results"), methods=["POST"], openapi_extra=reads)
    return routes


async def _rerank(services: Services, data: bytes, default: str) -> Response:
    body = await services.generator.parsed(parse_openai, data, RerankBody)
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    _check(body, len(texts))
    pairs = Pairs(firsts=[body.query], seconds=texts, names=("query", "documents"))
    found = await score_pairs(services, body, pairs, prefix="rerank")
    if (body.form or default) == "list":
        return json_response(_list(services, body, texts, found))
    reply = {
        "id": found.call.id,
        "model": services.config.model_name,
        "results": _results(body, texts, found),
        "usage": found.call.usage(),
        "weight_versions": list(dict.fromkeys(found.call.versions())),
    }
    return json_response(reply)


def _check(body: RerankBody, count: int) -> None:
    if count == 0:
        raise InvalidRequest("documents is empty; send at least one", field="documents")
    if body.top_n is not None and body.top_n < 0:
        raise InvalidRequest(f"top_n is {body.top_n}; give 0 or more", field="top_n")


def _best(body: RerankBody, found: Scored) -> list[int]:
    """Which documents are told of: the best first; of equal ones, that which came first."""
    order = sorted(range(len(found.scores)), key=lambda index: -found.scores[index])
    return order[: body.top_n or None]


def _results(body: RerankBody, texts: list[str], found: Scored) -> list[dict[str, Any]]:
    results = []
    for index in _best(body, found):
        result: dict[str, Any] = {"index": index, "relevance_score": found.scores[index]}
        if body.return_documents:
            result["document"] = {"text": texts[index]}
        results.append(result)
    return results


def _list(
    services: Services, body: RerankBody, texts: list[str], found: Scored
) -> list[dict[str, Any]]:
    entries = []
    for index in _best(body, found):
        entry: dict[str, Any] = {"score": found.scores[index], "index": index}
        if body.return_documents:
            entry["document"] = texts[index]
        entry["meta_info"] = native_meta(services, found.samples[index])
        entries.append(entry)
    return entries
