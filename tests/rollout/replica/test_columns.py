"""Outputs as columns and back: nothing is lost, reordered or shared."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import (
    FinishReason,
    Reply,
    RequestOutput,
    SpecCounts,
    TokenRows,
    TopLogprobs,
    VersionSpan,
    decode,
    encode,
)
from rollout.replica.columns import from_columns, to_columns

COUNT = st.integers(0, 2**31 - 1)
SPEC = st.builds(SpecCounts, verifies=COUNT, drafted=COUNT, accepted=COUNT, synthetic=st.booleans())


@st.composite
def outputs(draw: Any) -> RequestOutput:
    size, start = draw(st.integers(0, 3)), draw(st.integers(0, 1000))
    ids = np.array(draw(st.lists(COUNT, min_size=size, max_size=size)), np.int32)
    logprobs = (-ids / 7).astype(np.float32)
    output = RequestOutput(
        rid=draw(st.text(max_size=4)),
        start=start,
        token_ids=ids,
        logprobs=logprobs,
        prompt_tokens=draw(COUNT),
        cached_tokens=draw(COUNT),
        num_retractions=draw(COUNT),
        num_restarts=draw(COUNT),
        spans=[VersionSpan(draw(st.integers(0, 2**53)), start, start + size)],
        spec=draw(st.none() | SPEC),
    )
    more: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {},
                {},
                {"finish": FinishReason(type="length", length=3)},
                {"entropies": logprobs},
                {"prompt_logprobs": logprobs},
                {"kv_spans": [VersionSpan(1, 0, 4)]},
                {"spans": [VersionSpan(1, 0, 1), VersionSpan(2, 1, 2)]},
                {"top": TopLogprobs(ids[:, None], logprobs[:, None])},
            ]
        )
    )
    fields = {name: getattr(output, name) for name in output.__struct_fields__}
    return RequestOutput(**{**fields, **more})


@settings(max_examples=60, deadline=None)
@given(st.lists(outputs() | st.just(Reply(id=3)), max_size=30))
def test_there_and_back_over_the_wire(messages: list[RequestOutput | Reply]) -> None:
    kind = list[RequestOutput | TokenRows | Reply]
    found = from_columns(decode(encode(to_columns(messages)), kind))
    assert encode(found) == encode(messages)
    assert encode(from_columns(to_columns(messages))) == encode(messages)


def plain(rid: str, start: int = 0) -> RequestOutput:
    return RequestOutput(
        rid=rid,
        start=start,
        token_ids=np.array([start], np.int32),
        logprobs=np.zeros(1, np.float32),
        spans=[VersionSpan(0, start, start + 1)],
    )


def test_many_streams_are_one_message_and_keep_nothing_of_each_other() -> None:
    (rows,) = to_columns([plain(str(i)) for i in range(256)])
    assert isinstance(rows, TokenRows)
    found = from_columns([rows])
    assert all(
        output.token_ids.base is None for output in found if isinstance(output, RequestOutput)
    )


def test_a_reply_between_outputs_stays_between_them() -> None:
    messages = [*(plain(str(i)) for i in range(5)), Reply(id=7), *(plain(str(i)) for i in range(5))]
    kinds = [type(message).__name__ for message in to_columns(messages)]
    assert kinds == ["TokenRows", "Reply", "TokenRows"]
