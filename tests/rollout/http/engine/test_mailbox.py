"""Outputs that wait for a slow reader."""

from __future__ import annotations

import asyncio

import numpy as np

from engine.protocol import FinishReason, RequestOutput, VersionSpan
from rollout.http.engine.mailbox import Mailbox
from rollout.requests.outputs import coalesced

TOKENS = 3000


def output(rid: str, at: int, *, last: bool = False) -> RequestOutput:
    return RequestOutput(
        rid=rid,
        start=at,
        token_ids=np.array([at % 251], np.int32),
        logprobs=np.array([-at], np.float32),
        spans=[VersionSpan(1 + at // 1000, at, at + 1)],
        finish=FinishReason(type="length", length=at + 1) if last else None,
    )


def test_what_waits_is_joined_and_nothing_of_it_is_lost() -> None:
    box = Mailbox(["a", "b"])
    for at in range(TOKENS):
        for rid in ("a", "b"):
            box.put(output(rid, at, last=at == TOKENS - 1))
        assert len(box._outputs) <= 80, "an object a token is kept"
    found = {each.rid: each for each in coalesced(asyncio.run(box.take()))}
    assert not box.open
    for rid in ("a", "b"):
        got = found[rid]
        assert (got.start, got.finish is not None) == (0, True)
        assert got.token_ids.tolist() == [at % 251 for at in range(TOKENS)]
        np.testing.assert_array_equal(got.logprobs, -np.arange(TOKENS, dtype=np.float32))
        assert got.spans == [VersionSpan(v, 1000 * (v - 1), 1000 * v) for v in (1, 2, 3)]


def test_a_call_of_many_sequences_is_not_joined_over_and_over() -> None:
    """Each step brings every one a token: as long as their reader comes along, they are kept."""
    rids = [f"r{i}" for i in range(500)]
    box = Mailbox(rids)
    for at in range(3):
        for rid in rids:
            box.put(output(rid, at))
        found = asyncio.run(box.take())
        assert [each.rid for each in found] == rids
        assert all(each.start == at and len(each.token_ids) == 1 for each in found)
