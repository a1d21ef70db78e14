"""POST /classify: SGLang's route for sequence classifiers, such as reward models."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec import Struct, json

from engine.errors import InvalidRequest
from engine.protocol import ClassifyRequest, GenerateRequest
from rollout.http.edge.errors import json_response
from rollout.http.edge.sse import answer
from rollout.http.native.generate_call import GenerateCall, PromptRoom, parse_call, prompt_room
from rollout.http.native.sample import Sample
from rollout.http.openapi import takes
from rollout.http.services import Services
from rollout.requests.json_types import decode_json
from rollout.requests.wire import Fields

_FIELDS = frozenset(ClassifyRequest.__struct_fields__)
_META = ("id", "finish_reason", "prompt_tokens", "cached_tokens", "num_retractions", "kv_versions")


class _Named(Struct):
    """The model that a body names, which is not looked at."""

    model: str | None = None


def router(services: Services) -> APIRouter:
    """The route that scores texts."""
    routes = APIRouter()

    async def classify(request: Request) -> Response:
        return await answer(request, run(await request.body()))

    async def run(data: bytes) -> Response:
        room = prompt_room(services.engine.facts, services.tokenizer)
        call = await services.generator.parsed(_parse, data, room)
        samples = await services.generator.samples(call)
        await services.generator.finish(samples)
        found = [_scores(sample, services) for sample in samples]
        return json_response(found if call.batch else found[0])

    routes.add_api_route(
        "/classify",
        classify,
        methods=["POST", "PUT"],
        openapi_extra=takes(ClassifyRequest, batches=True),
    )
    return routes


def _parse(data: bytes, room: PromptRoom) -> GenerateCall:
    """The body as a call of `/generate` whose items are scored. Raises InvalidRequest naming the
    field, one that only generating has among them."""
    fields: Fields = decode_json(data, Fields)
    generating = GenerateRequest.__struct_fields__
    for name, value in fields.items():
        if name in generating and name not in _FIELDS and bytes(value) != b"null":
            raise InvalidRequest(
                f"{name} is for tokens that are sampled, and /classify samples none; leave it out",
                field=name,
            )
    decode_json(json.encode({"model": fields.pop("model", None)}), _Named)
    return dataclasses.replace(parse_call(json.encode(fields), room), task="classify")


def _scores(sample: Sample, services: Services) -> dict[str, Any]:
    """The reply to one text: raw scores of its labels, empty where it was aborted."""
    scores, meta = sample.output.scores, sample.response().meta_info
    told = {key: meta[key] for key in _META if key in meta}
    services.labels.relabel(told)
    if told.get("kv_versions"):
        told["weight_version"] = told["kv_versions"][-1]["version"]
    return {"embedding": [] if scores is None else scores.tolist(), "meta_info": told}
