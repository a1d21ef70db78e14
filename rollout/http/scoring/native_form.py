"""What SGLang's /classify and /encode share: the bodies of /generate without what samples, and a
vector in reply."""

from __future__ import annotations

from typing import Any, TypeVar

from msgspec import json
from msgspec.structs import replace

from engine.errors import InvalidRequest
from engine.protocol import ClassifyRequest, FloatArray, GenerateRequest, Task
from rollout.http.native.generate_call import GenerateCall, PromptRoom, parse_call
from rollout.http.native.sample import Sample
from rollout.http.services import Services
from rollout.requests.json_types import decode_json
from rollout.requests.wire import Fields

T = TypeVar("T", bound=ClassifyRequest)

_GENERATING = frozenset(GenerateRequest.__struct_fields__)
_META = ("id", "finish_reason", "prompt_tokens", "cached_tokens", "num_retractions", "kv_versions")


def parse_native(
    data: bytes, room: PromptRoom, kind: type[T], task: Task, route: str
) -> tuple[GenerateCall, T]:
    """The body as a call of `/generate` whose items have another task, and the fields of `kind`
    that /generate has not, which stand for every item. Raises InvalidRequest naming the field, one
    that only generating has among them."""
    fields: Fields = decode_json(data, Fields)
    for name, value in fields.items():
        if name in _GENERATING and name not in kind.__struct_fields__ and bytes(value) != b"null":
            raise InvalidRequest(
                f"{name} is for tokens that are sampled, and {route} samples none; leave it out",
                field=name,
            )
    shared = {name for name in kind.__struct_fields__ if name not in _GENERATING} & fields.keys()
    options: T = decode_json(json.encode({name: fields.pop(name) for name in shared}), kind)
    return replace(parse_call(json.encode(fields), room), task=task), options


def native_reply(services: Services, sample: Sample, vector: FloatArray | None) -> dict[str, Any]:
    """The reply to one prompt. vector: what came of it; None where it was aborted."""
    embedding = [] if vector is None else vector.tolist()
    return {"embedding": embedding, "meta_info": native_meta(services, sample)}


def native_meta(services: Services, sample: Sample) -> dict[str, Any]:
    """What SGLang's replies say of one prompt beside what came of it."""
    meta = sample.response().meta_info
    told = {key: meta[key] for key in _META if key in meta}
    services.labels.relabel(told)
    if told.get("kv_versions"):
        told["weight_version"] = told["kv_versions"][-1]["version"]
    return told
