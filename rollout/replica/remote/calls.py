"""Requests as calls of `/generate`, and the replies as outputs: nothing is lost on the way.

Samples of one prompt whose seeds come from one base are one call, so that whoever serves it
computes the prompt once. A seed goes as the base that the server derives it from, so that a request
draws what it would draw in the caller's own process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import numpy as np
from msgspec.structs import replace

from engine.errors import SlipstreamError, UnsupportedOption
from engine.protocol import (
    FinishReason,
    GenerateRequest,
    GenerateResponse,
    ReplicaState,
    Request,
    RequestOutput,
    RouteArray,
    RouteDType,
    SpecCounts,
    VersionSpan,
    encode,
    route_dtype,
)
from rollout.requests.seeds import common_base
from rollout.scheduler.routes.reply_fields import decoded_routes


@dataclass(frozen=True, kw_only=True)
class GenerateCall:
    """One call of `/generate`: `wire` asks for what each of `requests` does, in their order."""

    requests: tuple[Request, ...]
    wire: GenerateRequest


class _Span(msgspec.Struct):
    """As replies write a `VersionSpan`."""

    version: str
    start: int
    end: int


class _Meta(msgspec.Struct):
    """What is read of a reply's `meta_info`; `rollout/requests/respond.py` writes it."""

    finish_reason: FinishReason
    output_token_logprobs: list[list[Any]]
    weight_versions: list[_Span]
    prompt_tokens: int
    kv_versions: list[_Span] = msgspec.field(default_factory=list)
    cached_tokens: int = 0
    num_retractions: int = 0
    num_restarts: int = 0
    output_start: int = 0
    output_token_entropy: list[float] | None = None
    spec_verify_ct: int | None = None
    spec_num_proposed_drafts: int = 0
    spec_num_correct_drafts: int = 0
    synthetic: bool = False


# Has msgspec look the type up while this module is imported, and not in several threads at once.
_META = msgspec.json.Decoder(_Meta)


def generate_calls(requests: Sequence[Request], state: ReplicaState) -> list[GenerateCall]:
    """The calls that ask for what `requests` do, none of which has a `refusal`. state: of an engine
    that is to answer them."""
    bundles: dict[bytes, list[Request]] = {}
    for request in requests:
        same = replace(request, rid="", seed=0)
        key = encode(same) if _may_share(request) else f"alone {request.rid}".encode()
        bundles.setdefault(key, []).append(request)
    return [
        call for bundle in bundles.values() for call in _calls_of(bundle, state.max_samples, state)
    ]


def outputs_of(call: GenerateCall, replies: Sequence[GenerateResponse]) -> list[RequestOutput]:
    """The output of each request of a call. Raises SlipstreamError for replies that are not those
    of such a call."""
    if len(replies) != len(call.requests):
        raise _no_reply(f"{len(replies)} replies came to {len(call.requests)} samples")
    try:
        pairs = zip(call.requests, replies, strict=True)
        return [_output(request, reply) for request, reply in pairs]
    except (msgspec.ValidationError, LookupError, ValueError, TypeError) as error:
        raise _no_reply(str(error)) from error


def _no_reply(why: str) -> SlipstreamError:
    return SlipstreamError(
        f"what came is no reply of /generate of this version ({why})", field="server"
    )


def refusal(request: Request) -> UnsupportedOption | None:
    """Why a request has no place in such a call, naming its field; None if it has."""
    asked = {
        "task": request.task != "generate",
        "top_logprobs": request.top_logprobs > 0,
        "prompt_logprob_start": request.prompt_logprob_start >= 0,
        "logprob_ids": bool(request.logprob_ids),
        "session": bool(request.session),
        "stop": bool(request.sampling.stop),
    }
    for name, is_asked in asked.items():
        if is_asked:
            return UnsupportedOption(f"{name} is not sent to an engine over HTTP", field=name)
    return None


def _may_share(request: Request) -> bool:
    return bool(request.group) and request.output_ids is None


def _calls_of(bundle: list[Request], most: int, state: ReplicaState) -> list[GenerateCall]:
    """One call of requests that differ by id and seed, or one each."""
    base = common_base([r.seed for r in bundle]) if 1 < len(bundle) <= most else None
    if base is not None:
        return [GenerateCall(requests=tuple(bundle), wire=_wire(bundle, base, state))]
    calls = []
    for request in bundle:
        base = common_base([request.seed])
        assert base is not None, "one seed has a base"
        calls.append(GenerateCall(requests=(request,), wire=_wire([request], base, state)))
    return calls


def _wire(requests: Sequence[Request], base: int, state: ReplicaState) -> GenerateRequest:
    first = requests[0]
    # All stop tokens are named, those of the model with them.
    sampling = replace(
        first.sampling,
        n=len(requests),
        sampling_seed=base,
        ignore_eos=True,
        stop_token_ids=list(first.stop_ids) or None,
    )
    given, allowed = first.output_ids, first.allowed_token_ids
    return GenerateRequest(
        input_ids=first.prompt_ids.tolist(),
        sampling_params=sampling,
        return_logprob=True,
        return_entropy=first.entropy,
        priority=first.priority,
        cache_salt=first.salt,
        kv_policy=first.kv_policy,
        output_ids=None if given is None else given.tolist(),
        hold_at=first.hold_at,
        allowed_token_ids=None if allowed is None else allowed.tolist(),
        grammar=first.grammar,
        logprob_law=first.logprob_law,
        draft_tokens=first.draft_tokens,
        forced_acceptance=first.forced_acceptance,
        return_routed_experts=first.return_routed_experts,
        routed_experts_start_len=first.routed_experts_start_len,
        routed_experts_dtype=_dtype(state),
    )


def _dtype(state: ReplicaState) -> RouteDType:
    """As an engine has its routes, so that they come as it has them."""
    if state.experts is None:
        return "int32"
    return "uint8" if route_dtype(state.experts.num_experts).itemsize == 1 else "uint16"


def _output(request: Request, reply: GenerateResponse) -> RequestOutput:
    meta = msgspec.convert(reply.meta_info, _Meta)
    entropies, count = meta.output_token_entropy, len(reply.output_ids)
    told = [len(meta.output_token_logprobs), count if entropies is None else len(entropies)]
    if told != [count, count]:
        raise ValueError(f"{count} ids with {told[0]} logprobs and {told[1]} entropies")
    return RequestOutput(
        rid=request.rid,
        start=meta.output_start,
        token_ids=np.array(reply.output_ids, np.int32),
        logprobs=np.array([entry[0] for entry in meta.output_token_logprobs], np.float32),
        finish=meta.finish_reason,
        prompt_tokens=meta.prompt_tokens,
        cached_tokens=meta.cached_tokens,
        num_retractions=meta.num_retractions,
        num_restarts=meta.num_restarts,
        spans=_spans(meta.weight_versions),
        kv_spans=_spans(meta.kv_versions),
        entropies=None if entropies is None else np.array(entropies, np.float32),
        spec=_spec(meta),
        routed_experts=_routes(reply.meta_info),
        routed_experts_start=reply.meta_info.get("routed_experts_start_len", 0),
    )


def _spans(found: Sequence[_Span]) -> list[VersionSpan]:
    return [VersionSpan(int(span.version), span.start, span.end) for span in found]


def _spec(meta: _Meta) -> SpecCounts | None:
    if meta.spec_verify_ct is None:
        return None
    return SpecCounts(
        verifies=meta.spec_verify_ct,
        drafted=meta.spec_num_proposed_drafts,
        accepted=meta.spec_num_correct_drafts,
        synthetic=meta.synthetic,
    )


def _routes(meta: dict[str, Any]) -> RouteArray | None:
    found = decoded_routes(meta)
    if found is not None and found.dtype.kind != "u":
        raise ValueError(f"routes of {found.dtype}")
    return cast("RouteArray | None", found)
