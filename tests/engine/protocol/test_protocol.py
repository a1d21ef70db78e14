"""Every message survives its bytes; unknown fields of the wire are refused by name."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from engine import protocol as p


def test_a_plan_survives_its_bytes() -> None:
    ints = np.arange(3, dtype=np.int32)
    row = p.NewRow(
        slot=1,
        token_ids=ints,
        prompt_len=3,
        sampling=p.RowSampling(
            temperature=1.0,
            top_k=-1,
            top_p=1.0,
            min_p=0.0,
            frequency_penalty=0.0,
            presence_penalty=0.0,
            repetition_penalty=1.0,
            logit_bias={5: -1.0},
            seed=2**62,
            min_new_tokens=0,
            banned_ids=[2],
            top_logprobs=0,
        ),
    )
    plan = p.StepPlan(
        step=7,
        new_rows=[row],
        page_slots=ints,
        page_columns=ints,
        page_ids=ints,
        copy_src=ints[:0],
        copy_dst=ints[:0],
        slots=ints,
        query_lens=ints,
        kv_lens=ints,
        samples=np.array([True, False, True]),
    )
    copy = p.decode(p.encode(plan), p.StepPlan)
    assert copy.new_rows[0].sampling == row.sampling
    assert np.array_equal(copy.samples, plan.samples) and copy.samples.dtype == np.bool_
    assert copy.copy_src.shape == (0,) and copy.slots.dtype == np.int32


@pytest.mark.parametrize(
    "command",
    [
        p.Call(id=1, command=p.Abort(all=True)),
        p.Call(
            id=2,
            command=p.BeginUpdate(
                version=3, manifest=[p.TensorSpec("a.weight", "bfloat16", [2, 3])]
            ),
        ),
        p.Request(
            rid="r",
            prompt_ids=np.array([1, 2], dtype=np.int32),
            sampling=p.SamplingParams(stop=["x"], logit_bias={1: 2.0}),
            seed=-5,
        ),
    ],
    ids=lambda c: type(c).__name__,
)
def test_commands_are_told_apart_by_their_tag(command) -> None:
    copy = p.decode(p.encode(command), p.LeaderMessage)
    assert type(copy) is type(command)
    assert p.encode(copy) == p.encode(command)


def test_json_keys_of_logit_bias_become_token_ids() -> None:
    params = msgspec.json.decode(b'{"logit_bias": {"17": -2.5}}', type=p.SamplingParams)
    assert params.logit_bias == {17: -2.5}


def test_an_unknown_wire_field_is_refused_by_name() -> None:
    with pytest.raises(msgspec.ValidationError, match="top_kk"):
        msgspec.json.decode(b'{"top_kk": 3}', type=p.SamplingParams)
