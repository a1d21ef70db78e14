"""A reply that is written while its tokens are sampled is the one that is written at the end."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import (
    Abort,
    FinishReason,
    GenerateRequest,
    Request,
    RequestOutput,
    SamplingParams,
    VersionSpan,
)
from rollout.http.native.prepared_reply import PIECE, PreparedReply
from rollout.http.native.sample import Sample
from rollout.requests.respond import to_wire
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.http_app import run, serving, until
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LONG = {"max_new_tokens": 3 * PIECE + 5, "ignore_eos": True}


def sample_of(has_text: bool, wants: dict[str, Any], **fields: Any) -> Sample:
    sampling = SamplingParams(max_new_tokens=3 * PIECE)
    wire = GenerateRequest(input_ids=[1], sampling_params=sampling, **wants)
    request = Request(rid="a", prompt_ids=np.ones(1, np.int32), sampling=sampling, seed=0, **fields)
    return Sample(wire, request, TOKENIZER if has_text else None, index=2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from([{}, {"return_logprob": True}]),
    st.booleans(),
    st.sampled_from(["length", "stop", "abort", "hold"]),
)
def test_it_is_the_reply_written_at_the_end(
    sizes: list[int], has_text: bool, wants: dict[str, Any], spelled: bool, finish: Any
) -> None:
    sample = sample_of(has_text, {**wants, "return_text_in_logprobs": spelled})
    assert sample.come_in_pieces(PIECE)
    prepared, start = PreparedReply(sample), 0
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        ids = np.arange(start, start + size, dtype=np.int32) % 200
        output = RequestOutput(
            rid="a",
            start=start,
            token_ids=ids,
            logprobs=-ids.astype(np.float32) / 7,
            spans=[VersionSpan(number, start, start + size)] if size else [],
            kv_spans=[VersionSpan(1, 0, 3)] if last else [],
            finish=FinishReason(type=finish, matched=7) if last else None,
        )
        start += size
        prepared.add(sample.take(output))
    expected = msgspec.json.encode(to_wire(sample.response()))
    assert msgspec.json.encode(prepared.object()) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_policy": "fresh"},
        {"entropy": True},
        {"top_logprobs": 1},
        {"logprob_ids": [1]},
        {"prompt_logprob_start": 0},
        {"stream": True},
        {"session": "s"},
        {"output_ids": np.ones(1, np.int32)},
    ],
)
def test_what_has_more_than_tokens_or_may_start_again_comes_at_the_end(
    fields: dict[str, Any],
) -> None:
    sample = sample_of(False, {}, **fields)
    before = sample.request
    assert not sample.come_in_pieces(PIECE)
    assert sample.request is before


def test_a_long_reply_comes_in_pieces_and_a_short_one_at_its_end() -> None:
    async def test() -> None:
        async with serving() as server:
            for sampling in (LONG, {**LONG, "max_new_tokens": 9}):
                body = {"input_ids": [5], "return_logprob": True, "sampling_params": sampling}
                found = (await server.post("/generate", body)).json()
                ids = expected_tokens([5], sampling["max_new_tokens"])
                assert found["output_ids"] == ids
                entries = found["meta_info"]["output_token_logprobs"]
                assert [entry[1] for entry in entries] == ids
                assert [entry[0] for entry in entries] == pytest.approx([-i / 100 for i in ids])
                assert found["text"] == tiny_tokenizer().decode(ids)
                assert found["meta_info"]["finish_reason"]["length"] == len(ids)
            every = [(r.stream, r.stream_every) for r in server.link.requests]
            assert every == [(True, PIECE), (False, 1)]

    run(test)


def test_a_long_reply_that_is_aborted_has_the_tokens_so_far() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"rid": "a", "input_ids": [5], "sampling_params": LONG, "return_logprob": True}
            call = asyncio.ensure_future(server.post("/generate", body))
            state = server.link.leader.state

            def stalled() -> bool:
                server.link.stalled = state().num_output_tokens > PIECE + 3
                return server.link.stalled

            await until(stalled)
            server.link.stalled = False
            await server.engine.send(Abort(rid="a"))
            found = (await call).json()
            count = len(found["output_ids"])
            assert found["meta_info"]["finish_reason"]["type"] == "abort"
            assert PIECE < count <= LONG["max_new_tokens"]
            assert found["output_ids"] == expected_tokens([5], count)
            assert len(found["meta_info"]["output_token_logprobs"]) == count

    run(test)
