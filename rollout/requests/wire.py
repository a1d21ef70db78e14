"""Parse native `/generate` objects: one JSON object into a `GenerateRequest`.

Fields that the dialect has and this engine does not serve pass while they ask for nothing (null,
false, empty), since clients send their defaults; so do hints to other servers.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import GenerateRequest, SamplingParams
from engine.protocol.types import ClientId
from rollout.requests.json_types import decode_json
from rollout.requests.known_fields import UNSERVED, WITHOUT_EFFECT
from rollout.requests.nearest import nearest

Fields = dict[str, Raw]

_UNKNOWN = re.compile(r"contains unknown field `([^`]+)`")
_INERT = frozenset({b"null", b"false", b'""', b"[]", b"{}"})
_HINTS = WITHOUT_EFFECT["native"]
_SOURCES = frozenset({"json_schema", "regex", "ebnf", "structural_tag"})
"""Fields of which the empty text asks for nothing, as null does."""
_OWN = frozenset(GenerateRequest.__struct_fields__)
_OWN_SAMPLING = frozenset(SamplingParams.__struct_fields__)


def parse_request(data: bytes | str) -> GenerateRequest:
    """Raises InvalidRequest naming the field, UnsupportedOption for one that the dialect
    has and this engine does not serve."""
    fields: Fields = decode_json(data, Fields, field="", what="the request")
    return parse_fields(meaningful_fields(fields))


def meaningful_fields(fields: Fields) -> Fields:
    """Without nulls, hints, and fields of others that ask for nothing."""
    return _known(fields, _OWN)


def parse_fields(fields: Fields) -> GenerateRequest:
    """`parse_request` of an object in its fields, those of `meaningful_fields`."""
    if "session_params" in fields:
        fields = _with_session(fields)
    sampling = fields.get("sampling_params")
    if sampling is not None and bytes(sampling)[:1] == b"{":
        own: Fields = decode_json(sampling, Fields, field="sampling_params", what="sampling_params")
        found = msgspec.json.encode(_known(own, _OWN_SAMPLING))
        fields = {**fields, "sampling_params": Raw(found)}
    try:
        wire: GenerateRequest = decode_json(msgspec.json.encode(fields), GenerateRequest)
    except InvalidRequest as error:
        raise _explain(error) from error
    return wire


class _SessionParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """SGLang's name for `session`, and what its sessions could do beside appending."""

    id: ClientId
    rid: str | None = None
    offset: int | None = None
    replace: bool = False
    drop_previous_output: bool = False


def _with_session(fields: Fields) -> Fields:
    """The fields with `session` in place of `session_params`. Raises UnsupportedOption naming the
    part of it that is no append."""
    name = "session_params"
    found: _SessionParams = decode_json(fields[name], _SessionParams, field=name, what=name)
    for part in ("rid", "offset", "replace", "drop_previous_output"):
        if getattr(found, part):
            raise UnsupportedOption(
                f"{name}.{part} is not served: every turn goes on behind the last one; session_at, "
                "beside session, goes on from an earlier point",
                field=f"{name}.{part}",
            )
    kept = {key: value for key, value in fields.items() if key != name}
    return {**kept, "session": Raw(msgspec.json.encode(found.id))}


def _known(fields: Fields, own: frozenset[str]) -> Fields:
    return {name: value for name, value in fields.items() if not _inert(name, value, own)}


def _inert(name: str, value: Raw, own: frozenset[str]) -> bool:
    if name in own:
        return bytes(value) == b"null" or (name in _SOURCES and bytes(value) == b'""')
    return name in _HINTS or bytes(value) in _INERT


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
