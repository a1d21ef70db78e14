"""Parse native `/generate` objects: one JSON object into a `GenerateRequest`."""

from __future__ import annotations

import re

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import GenerateRequest, SamplingParams
from rollout.requests.json_types import decode_json
from rollout.requests.known_fields import UNSERVED
from rollout.requests.nearest import nearest

_UNKNOWN = re.compile(r"contains unknown field `([^`]+)`")


def parse_request(data: bytes | str) -> GenerateRequest:
    """Raises InvalidRequest naming the field, UnsupportedOption for one that the dialect
    has and this engine does not serve."""
    try:
        found: GenerateRequest = decode_json(data, GenerateRequest, field="", what="the request")
    except InvalidRequest as error:
        raise _explain(error) from error
    return found


def _explain(error: InvalidRequest) -> InvalidRequest:
    unknown = _UNKNOWN.search(error.message)
    if unknown is None:
        return error
    name, parent = unknown.group(1), error.field
    field = f"{parent}.{name}" if parent else name
    if name in UNSERVED["native"]:
        return UnsupportedOption(f"{field} is not served by this engine; leave it out", field=field)
    return InvalidRequest(
        f"{field} is not a field of a generate request; {_advice(name, parent)}", field=field
    )


def _advice(name: str, parent: str) -> str:
    """What whoever wrote `name` in `parent` may have meant; sampling parameters have a place of
    their own."""
    sampling = [f"sampling_params.{field}" for field in SamplingParams.__struct_fields__]
    own = [] if parent else GenerateRequest.__struct_fields__
    if parent and name in GenerateRequest.__struct_fields__:
        return f"write {name} beside {parent}"
    if f"sampling_params.{name}" in sampling:
        return f"did you mean sampling_params.{name}?"
    by_name = {field.rpartition(".")[2]: field for field in (*sampling, *own)}
    meant = nearest(name, by_name)
    return "leave it out" if meant is None else f"did you mean {by_name[meant]}?"
