"""Errors cross process boundaries with class, message and field."""

from __future__ import annotations

import json
import pickle

import pytest

from engine import errors


def body_of(**error: str) -> bytes:
    return json.dumps({"error": error}).encode()


def tree(root: type) -> list[type]:
    return [root, *(cls for child in root.__subclasses__() for cls in tree(child))]


@pytest.mark.parametrize("kind", tree(errors.SlipstreamError), ids=lambda k: k.__name__)
def test_survives_the_wire_and_pickle(kind: type[errors.SlipstreamError]) -> None:
    error = kind("what happened", field="top_p")
    for copy in (
        errors.by_name(kind.__name__, error.message, error.field),
        pickle.loads(pickle.dumps(error)),
        error.copy(),
        errors.of_body(body_of(type=kind.__name__, message=error.message, field=error.field)),
    ):
        assert type(copy) is kind
        assert (str(copy), copy.field, copy.status) == ("what happened", "top_p", error.status)


def test_an_unknown_kind_keeps_its_name() -> None:
    error = errors.by_name("Strange", "boom", "rank 3")
    assert type(error) is errors.SlipstreamError
    assert "Strange" in str(error) and error.field == "rank 3"


def test_an_error_says_the_same_to_each_caller_in_an_object_of_its_own() -> None:
    error = errors.EngineDead("gone", field="leader")
    assert error.copy() is not error


def test_a_body_may_leave_out_the_field() -> None:
    found = errors.of_body(body_of(type="UpdateOrder", message="busy"))
    assert type(found) is errors.UpdateOrder and (str(found), found.field) == ("busy", "")


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[]", b"3", b"{}", b'{"error": "x"}', b'{"error": {"type": "A"}}']
)
def test_a_body_of_another_shape_is_no_error_of_ours(body: bytes) -> None:
    assert errors.of_body(body) is None


def test_callers_mistakes_are_value_errors() -> None:
    assert issubclass(errors.InvalidRequest, ValueError)
    assert errors.InvalidRequest("x").status == 400
