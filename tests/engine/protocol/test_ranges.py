"""What a message of this process may hold is what decoding it would take."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import protocol as p
from engine.protocol.ranges import OutOfRange, check_ranges
from tests.helpers.scheduling import make_request


def refused_field(message: msgspec.Struct) -> str | None:
    try:
        check_ranges(message)
    except OutOfRange as error:
        assert error.field.split("[")[0] in error.message
        return error.field
    return None


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": 2**31}, "sampling.top_k"),
        ({"top_k": 2**63}, "sampling.top_k"),
        ({"min_new_tokens": 2**31}, "sampling.min_new_tokens"),
        ({"max_new_tokens": 10**500}, "sampling.max_new_tokens"),
        ({"temperature": 1e39}, "sampling.temperature"),
        ({"temperature": 10**400}, "sampling.temperature"),
        ({"temperature": math.nan}, "sampling.temperature"),
        ({"temperature": np.float32(1.0)}, "sampling.temperature"),
        ({"presence_penalty": 1e30}, "sampling.presence_penalty"),
        ({"logit_bias": {1: math.inf}}, "sampling.logit_bias"),
        ({"logit_bias": {"1": 1.0}}, "sampling.logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "sampling.logit_bias"),
        ({"n": True}, "sampling.n"),
        ({"n": np.int64(1)}, "sampling.n"),
        ({"ignore_eos": 1}, "sampling.ignore_eos"),
        ({"stop": "x" * 1025}, "sampling.stop"),
        ({"stop": ["x"] * 129}, "sampling.stop"),
        ({"stop": "\ud800"}, "sampling.stop"),
        ({"stop_token_ids": [1, 2**31]}, "sampling.stop_token_ids"),
        ({"stop_token_ids": [0] * 1025}, "sampling.stop_token_ids"),
        ({"stop_token_ids": (1,)}, "sampling.stop_token_ids"),
        ({"sampling_seed": 2**63}, "sampling.sampling_seed"),
    ],
)
def test_a_value_that_its_storage_does_not_hold_is_refused(options: Any, field: str) -> None:
    sampling = p.SamplingParams(**options)
    request = p.Request(rid="a", prompt_ids=np.array([1], np.int32), sampling=sampling, seed=0)
    assert refused_field(request) == field


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (p.SetVersion(version=2**63), "version"),
        (p.Call(id=1, command=p.CommitUpdate(version=-1)), "command.version"),
        (p.Call(id=1, command=3), "command"),  # type: ignore[arg-type]
        (p.GetWeight(name="a", count=10**9), "count"),
        (p.BeginUpdate(version=1, timeout_s=math.inf), "timeout_s"),
        (p.BeginUpdate(version=1, timeout_s=0.0), "timeout_s"),
        (p.BeginUpdate(version=1, manifest=[p.TensorSpec("a", "b", [1, -1])]), "manifest[0].shape"),
        (
            p.BeginUpdate(version=1, manifest=[p.TensorSpec("a", "b", [1], checksum=2**64)]),
            "manifest[0].checksum",
        ),
        (p.JoinGroup(name="g", address="h", port=70000, rank_offset=1, world_size=2), "port"),
        (p.JoinGroup(name="g", address="h", port=1, rank_offset=-1, world_size=2), "rank_offset"),
        (
            p.ReceiveBroadcast(group="g", tensors=[p.TensorPiece("a", "b", [1], stop=-2)]),
            "tensors[0].stop",
        ),
        (p.ReceiveBroadcast(group="g", tensors=[], bucket_bytes=0), "bucket_bytes"),
        (p.LoadFromDisk(path="x" * 5000), "path"),
        (p.Abort(rid="x" * 600), "rid"),
        (p.ReleaseMemory(tags=["weights", "all"]), "tags"),  # type: ignore[list-item]
        (p.Pause(mode="stop"), "mode"),  # type: ignore[arg-type]
    ],
)
def test_commands_too(message: msgspec.Struct, field: str) -> None:
    assert refused_field(message) == field


def test_what_is_in_range_passes() -> None:
    bias = {1: -math.inf, 2: 3}
    sampling = p.SamplingParams(temperature=1, logit_bias=bias, stop=["a", "é"], n=7)
    check_ranges(p.Request(rid="a", prompt_ids=np.array([1]), sampling=sampling, seed=2**63 - 1))
    check_ranges(p.SetVersion(version=2**53))
    spec = p.TensorSpec("a", "bfloat16", [0, 2], checksum=2**64 - 1)
    check_ranges(p.Call(id=1, command=p.BeginUpdate(version=0, manifest=[spec])))


def test_fields_can_be_left_out() -> None:
    request = make_request("a", [1], temperature=math.nan)
    check_ranges(request, skip=("sampling",))
    assert refused_field(request) == "sampling.temperature"


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-(2**32), 2**32) | st.text(max_size=2), max_size=3),
    st.dictionaries(st.integers(-5, 5), st.floats(), max_size=2),
)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    kind=st.sampled_from(
        [p.SamplingParams, p.JoinGroup, p.BeginUpdate, p.GetWeight, p.SetVersion, p.Abort, p.Stop]
    ),
    data=st.data(),
)
def test_a_message_that_passes_survives_the_channel(kind: Any, data: st.DataObject) -> None:
    good: dict[str, Any] = {
        "JoinGroup": {"name": "g", "address": "h", "port": 1, "rank_offset": 1, "world_size": 2},
        "BeginUpdate": {"version": 1},
        "GetWeight": {"name": "a"},
        "SetVersion": {"version": 1},
        "Stop": {"rid": "a", "num_tokens": 1, "matched": "x"},
    }.get(kind.__name__, {})
    field = data.draw(st.sampled_from(kind.__struct_fields__))
    message = kind(**{**good, field: data.draw(VALUES)})
    if refused_field(message) is None:
        assert p.decode(p.encode(message), kind) == message
