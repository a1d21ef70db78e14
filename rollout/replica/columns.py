"""Outputs of many streams as columns, for the channel between leader and caller.

A step brings each of hundreds of streams one token. As a struct each, with arrays of one number,
they cost both processes more time than the numbers do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np

from engine.protocol import IntArray, Reply, RequestOutput, SpecCounts, TokenRows, VersionSpan

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

_FEWEST = 4
"""Rows below which columns save nothing."""

Message = RequestOutput | Reply
R = TypeVar("R", bound=Reply)


def to_columns(messages: Sequence[Message | TokenRows]) -> list[Message | TokenRows]:
    """The messages in their order, those of neighbouring streams that only got tokens joined."""
    found: list[Message | TokenRows] = []
    run: list[RequestOutput] = []
    for message in messages:
        if _is_plain(message):
            run.append(message)
            continue
        found += _joined(run)
        found.append(message)
        run = []
    return found + _joined(run)


def from_columns(messages: Iterable[R | RequestOutput | TokenRows]) -> list[R | RequestOutput]:
    """Inverse of `to_columns`."""
    found: list[R | RequestOutput] = []
    for message in messages:
        if isinstance(message, TokenRows):
            found += _outputs(message)
        else:
            found.append(message)
    return found


def _joined(run: list[RequestOutput]) -> list[Message | TokenRows]:
    return [_columns(run)] if len(run) >= _FEWEST else list(run)


def _is_plain(message: Message | TokenRows) -> TypeGuard[RequestOutput]:
    return (
        isinstance(message, RequestOutput)
        and message.finish is None
        and message.top is None
        and message.entropies is None
        and message.prompt_logprobs is None
        and message.prompt_top is None
        and not message.kv_spans
        and len(message.spans) == 1
    )


def taken_rows(rows: TokenRows, at: IntArray) -> TokenRows:
    """The rows of these indices, in their order. at: int32, ascending."""
    if len(at) == len(rows.rids):
        return rows
    tokens: IntArray | BoolArray = at
    if len(rows.token_ids) != len(rows.rids) or (rows.sizes != 1).any():
        chosen = np.zeros(len(rows.rids), np.bool_)
        chosen[at] = True
        tokens = np.repeat(chosen, rows.sizes)
    return TokenRows(
        rids=[rows.rids[i] for i in at.tolist()],
        starts=rows.starts[at],
        sizes=rows.sizes[at],
        versions=rows.versions[at],
        token_ids=rows.token_ids[tokens],
        logprobs=rows.logprobs[tokens],
        counts=rows.counts[:, at],
        spec=None if rows.spec is None else rows.spec[:, at],
    )


def _columns(outputs: list[RequestOutput]) -> TokenRows:
    counts = [
        (o.prompt_tokens, o.cached_tokens, o.num_retractions, o.num_restarts) for o in outputs
    ]
    return TokenRows(
        rids=[output.rid for output in outputs],
        starts=np.array([output.start for output in outputs], np.int32),
        sizes=np.array([len(output.token_ids) for output in outputs], np.int32),
        versions=np.array([output.spans[0].version for output in outputs], np.int64),
        token_ids=np.concatenate([output.token_ids for output in outputs]),
        logprobs=np.concatenate([output.logprobs for output in outputs]),
        counts=np.ascontiguousarray(np.array(counts, np.int32).T),
        spec=_spec_columns([output.spec for output in outputs]),
    )


def _spec_columns(spec: list[SpecCounts | None]) -> IntArray | None:
    if not any(spec):
        return None
    rows = [
        (-1, -1, -1, -1) if s is None else (s.verifies, s.drafted, s.accepted, s.synthetic)
        for s in spec
    ]
    return np.ascontiguousarray(np.array(rows, np.int32).T)


def _spec_rows(rows: TokenRows) -> list[SpecCounts | None]:
    if rows.spec is None:
        return [None] * len(rows.rids)
    return [
        None
        if verifies < 0
        else SpecCounts(
            verifies=verifies, drafted=drafted, accepted=accepted, synthetic=bool(synthetic)
        )
        for verifies, drafted, accepted, synthetic in rows.spec.T.tolist()
    ]


def _outputs(rows: TokenRows) -> list[RequestOutput]:
    ends = np.cumsum(rows.sizes).tolist()
    columns = (rows.rids, rows.starts.tolist(), rows.sizes.tolist(), ends, rows.versions.tolist())
    return [
        RequestOutput(
            rid=rid,
            start=start,
            # A copy each: a view would keep the whole frame for as long as one stream is open.
            token_ids=rows.token_ids[end - size : end].copy(),
            logprobs=rows.logprobs[end - size : end].copy(),
            prompt_tokens=prompt,
            cached_tokens=cached,
            num_retractions=retractions,
            num_restarts=restarts,
            spans=[VersionSpan(version, start, start + size)],
            spec=spec,
        )
        for rid, start, size, end, version, prompt, cached, retractions, restarts, spec in zip(
            *columns, *rows.counts.tolist(), _spec_rows(rows), strict=True
        )
    ]
