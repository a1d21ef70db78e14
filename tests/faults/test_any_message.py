"""Any value in any field of a message that a program hands to the engine: a typed error or an
answer, for that message alone.

What comes over HTTP was decoded against the types; a caller in this process, and a route that
computes a field, hand over what they like. The leader is the last boundary.
"""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import SlipstreamError
from engine.protocol import Command, GetState, Request, SamplingParams, Shutdown
from rollout.replica.inline import InlineReplica
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.hostile_json import objects
from tests.helpers.replicas import inline, make_request

pytestmark = pytest.mark.slow

# What a JSON text can say and Python can hold, and what only Python says.
VALUES: list[Any] = [
    *objects(),
    math.nan,
    math.inf,
    -math.inf,
    np.float32(1.5),
    np.int64(2**62),
    b"bytes",
    (1, 2),
    {3: 4},
    object(),
]
STEPS = 2_000
REQUEST_FIELDS = [("", name) for name in Request.__struct_fields__]
REQUEST_FIELDS += [("sampling", name) for name in SamplingParams.__struct_fields__]
COMMANDS = [kind for kind in get_args(Command) if kind is not Shutdown]
COMMAND_FIELDS = [(kind, name) for kind in COMMANDS for name in kind.__struct_fields__]
seeded = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def drain(replica: InlineReplica) -> dict[Any, Any]:
    """Outputs by id, until the replica is idle or has made a bounded number of steps."""
    found = {}
    for _ in range(STEPS):
        for output in replica.step():
            if output.finish is not None:
                found[repr(output.rid)] = output
        if replica.idle():
            return found
    raise AssertionError("the replica does not come to rest")


def assert_serves(replica: InlineReplica) -> None:
    """A command is answered and another request gets the tokens it always gets."""
    assert replica.send(GetState()).state is not None
    replica.submit([make_request("good", [1, 2, 3])])
    good = drain(replica)[repr("good")]
    assert good.token_ids.tolist() == expected_tokens([1, 2, 3], 8)


def check_request(group: str, name: str, value: Any) -> None:
    request = make_request("odd", [5, 6])
    if group:
        sampling = msgspec.structs.replace(request.sampling, **{name: value})
        request = msgspec.structs.replace(request, sampling=sampling)
    else:
        request = msgspec.structs.replace(request, **{name: value})
    with inline() as replica:
        replica.submit([make_request("before", [1, 2, 3])])
        try:
            replica.submit([request])
        except SlipstreamError as error:
            assert error.message
        beside = drain(replica)[repr("before")]
        assert beside.token_ids.tolist() == expected_tokens([1, 2, 3], 8), "a stranger was hit"
        assert_serves(replica)


def command_with(kind: type[Any], name: str, value: Any) -> Any:
    """A command of that kind with one odd value, its other required fields plain."""
    plain: dict[Any, Any] = {int: 1, str: "g", bytes: b"g", float: 1.0}
    fields = {
        field.name: plain.get(field.type, [] if "list" in str(field.type) else 1)
        for field in msgspec.structs.fields(kind)
        if field.required
    }
    return kind(**{**fields, name: value})


def check_command(kind: type[Any], name: str, value: Any) -> None:
    with inline() as replica:
        replica.submit([make_request("before", [1, 2, 3])])
        try:
            replica.send(command_with(kind, name, value))
        except SlipstreamError as error:
            assert error.message
        state = replica.send(GetState()).state
        assert state is not None
        # A command that was taken may rightly have paused, aborted or begun something.
        if not (state.paused or state.refusal or state.released or state.open_update is not None):
            drain(replica)
            assert replica.send(GetState()).state is not None


@seeded
@given(field=st.sampled_from(REQUEST_FIELDS), value=st.sampled_from(VALUES))
def test_a_request_with_an_odd_value(field: tuple[str, str], value: Any) -> None:
    check_request(*field, value)


@seeded
@given(field=st.sampled_from(COMMAND_FIELDS), value=st.sampled_from(VALUES))
def test_a_command_with_an_odd_value(field: tuple[type[Any], str], value: Any) -> None:
    check_command(*field, value)


@pytest.mark.parametrize(
    "value",
    ["text", [[1], [2, 3]], json.loads("[" * 150 + "]" * 150), {"a": 1}],
    ids=["text", "ragged", "deep", "object"],
)
def test_a_prompt_that_is_no_array(value: Any) -> None:
    """The refusal itself must not look into what was refused."""
    check_request("", "prompt_ids", value)


@pytest.mark.long
@pytest.mark.parametrize("group,name", REQUEST_FIELDS)
def test_every_value_in_every_field_of_a_request(group: str, name: str) -> None:
    for value in VALUES:
        check_request(group, name, value)


@pytest.mark.long
@pytest.mark.parametrize("kind,name", COMMAND_FIELDS)
def test_every_value_in_every_field_of_a_command(kind: type[Any], name: str) -> None:
    for value in VALUES:
        check_command(kind, name, value)
