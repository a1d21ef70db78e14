"""What was sampled, as bytes that another server reads: the outputs that came together.

Most outputs are tokens and their logprobs, and are written as a row of a few numbers; what has more
is written whole. A sequence is known by its place in its call, so that ids may differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from engine.errors import InvalidRequest
from engine.protocol import RequestOutput, VersionSpan, decode, encode
from engine.protocol.types import Count, Version


class Row(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """Tokens of one version. place: of the sequence in its call. ids int32, logprobs float32."""

    place: Count
    start: Count
    version: Version
    ids: bytes
    logprobs: bytes
    prompt_tokens: Count
    cached_tokens: Count
    num_retractions: Count
    num_restarts: Count


class Whole(msgspec.Struct, frozen=True, array_like=True, tag="o"):
    """Any output."""

    place: Count
    output: RequestOutput


Record = list[Row | Whole]


def encoded(outputs: Sequence[tuple[int, RequestOutput]]) -> bytes:
    """The record of outputs that came together, each with the place of its sequence."""
    return encode([_row(place, output) or Whole(place, output) for place, output in outputs])


def decoded(record: bytes, rids: Sequence[str]) -> list[RequestOutput]:
    """The outputs of a record, for the sequences `rids`. Raises InvalidRequest for bytes that are
    none, or that speak of others."""
    try:
        rows: Record = decode(record, Record)
        return [_output(row, rids[row.place]) for row in rows]
    except (msgspec.DecodeError, ValueError, IndexError) as error:
        raise InvalidRequest(f"a record cannot be read: {error}", field="journal") from error


def _row(place: int, output: RequestOutput) -> Row | None:
    more = (
        output.finish,
        output.top,
        output.prompt_logprobs,
        output.prompt_top,
        output.entropies,
        output.scores,
        output.embedding,
        output.spec,
    )
    if len(output.spans) != 1 or output.kv_spans or any(value is not None for value in more):
        return None
    return Row(
        place=place,
        start=output.start,
        version=output.spans[0].version,
        ids=output.token_ids.astype(np.int32).tobytes(),
        logprobs=output.logprobs.astype(np.float32).tobytes(),
        prompt_tokens=output.prompt_tokens,
        cached_tokens=output.cached_tokens,
        num_retractions=output.num_retractions,
        num_restarts=output.num_restarts,
    )


def _output(row: Row | Whole, rid: str) -> RequestOutput:
    if isinstance(row, Whole):
        return msgspec.structs.replace(row.output, rid=rid)
    ids, logprobs = np.frombuffer(row.ids, np.int32), np.frombuffer(row.logprobs, np.float32)
    if len(ids) != len(logprobs):
        raise ValueError(f"{len(ids)} tokens have {len(logprobs)} logprobs")
    span = VersionSpan(row.version, row.start, row.start + len(ids))
    return RequestOutput(
        rid=rid,
        start=row.start,
        token_ids=ids,
        logprobs=logprobs,
        prompt_tokens=row.prompt_tokens,
        cached_tokens=row.cached_tokens,
        num_retractions=row.num_retractions,
        num_restarts=row.num_restarts,
        spans=[span],
    )
