"""Replies in parts: the request that continues one, and the reply that its parts make.

A caller that holds a request (`hold_at`), or whose server aborted it or died, sends the tokens it
has to any server with the same weights, and joins what comes with what came:

    parts = [client.generate(request)]
    while unfinished(parts[-1]):
        request = continued(request, parts[-1])
        parts.append(client.generate(request))
    replies = joined(parts)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.protocol import GenerateRequest, GenerateResponse
from rollout.scheduler.routes.reply_fields import joined_route_meta, next_start
from rollout.scheduler.speculative.reply_fields import joined_spec_meta

Replies = Sequence[GenerateResponse]
"""What `Client.generate` returns for one request: a reply for each of its samples, in order; or
the last frame of a stream that is not one of increments, ended or broken off."""

_SUMS = ("num_retractions", "num_restarts")
_SEAMS = ("output_start", "text_start", "sampling_seed")


def unfinished(replies: Replies) -> bool:
    """Whether any of the samples was held, aborted, or broken off before its end."""
    reasons = [reply.meta_info["finish_reason"] for reply in replies]
    return any(reason is None or reason["type"] in ("hold", "abort") for reason in reasons)


def continued(request: GenerateRequest, replies: Replies, *, hold_at: int = -1) -> GenerateRequest:
    """The request that goes on where `replies`, all those to `request`, were cut.

    Samples that were over come back at once, without tokens. The seed is the one stated, or that
    of the replies where they were held; without either the tokens to come are drawn by another.
    hold_at: as in the request. Of routes it asks for those that these replies lack.
    """
    given = _given(request, len(replies))
    ids = [_extended(known, reply) for known, reply in zip(given, replies, strict=True)]
    sampling = request.sampling_params
    seeds = [reply.meta_info.get("sampling_seed") for reply in replies]
    seed = next((seed for seed in seeds if seed is not None), sampling.sampling_seed)
    return msgspec.structs.replace(
        request,
        output_ids=ids if len(ids) > 1 else ids[0],
        hold_at=hold_at,
        sampling_params=msgspec.structs.replace(sampling, sampling_seed=seed),
        routed_experts_start_len=next_start([reply.meta_info for reply in replies]),
    )


def joined(parts: Sequence[Replies]) -> list[GenerateResponse]:
    """The replies that their parts make, in the order in which they were given: for each sample
    the tokens, text, logprobs, entropies and version spans of a reply that was never cut.

    `kv_versions` is the last part's: another engine computed the KV of all tokens again. The route
    of each token is of the part that sampled the token behind it.
    """
    return [_joined(sample) for sample in zip(*parts, strict=True)]


def _given(request: GenerateRequest, count: int) -> list[list[int]]:
    found: list[Any] = list(request.output_ids or ())
    if not found:
        return [[] for _ in range(count)]
    return found if isinstance(found[0], list) else [found]


def _extended(ids: list[int], reply: GenerateResponse) -> list[int]:
    return [*ids[: reply.meta_info.get("output_start", 0)], *reply.output_ids]


def _joined(parts: Replies) -> GenerateResponse:
    first, last = parts[0], parts[-1]
    ids: list[int] = []
    columns: dict[str, list[Any]] = {}
    text = None if first.text is None else ""
    for part in parts:
        start = part.meta_info.get("output_start", 0)
        ids = [*ids[:start], *part.output_ids]
        for name, values in part.meta_info.items():
            if name.startswith("output_") and isinstance(values, list):
                columns[name] = [*columns.get(name, [])[:start], *values]
        if text is not None:
            text = text[: part.meta_info.get("text_start", 0)] + (part.text or "")
    meta = {key: value for key, value in last.meta_info.items() if key not in _SEAMS}
    meta |= columns
    if "output_token_logprobs" in columns:
        meta["output_token_logprobs_length"] = len(columns["output_token_logprobs"])
    of_prompt = {k: v for k, v in first.meta_info.items() if k.startswith("input_")}
    meta |= {**of_prompt, "cached_tokens": first.meta_info["cached_tokens"]}
    meta |= {key: sum(part.meta_info[key] for part in parts) for key in _SUMS}
    metas = [part.meta_info for part in parts]
    meta |= joined_spec_meta(metas) | joined_route_meta(metas)
    meta["weight_versions"] = spans = _spans(parts, len(ids))
    meta["weight_version"] = spans[-1]["version"] if spans else None
    return msgspec.structs.replace(last, text=text, output_ids=ids, meta_info=meta)


def _spans(parts: Replies, size: int) -> list[dict[str, Any]]:
    """Version spans of `size` output tokens, neighbours of one version as one."""
    found: list[dict[str, Any]] = []
    for span in (span for part in parts for span in part.meta_info["weight_versions"]):
        if span["start"] >= size:
            continue
        end = min(span["end"], size)
        if found and found[-1]["version"] == span["version"]:
            found[-1] = {**found[-1], "end": end}
        else:
            found.append({**span, "end": end})
    return found
