"""Errors cross process boundaries with class, message and field."""

from __future__ import annotations

import pickle

import pytest

from engine import errors


def tree(root: type) -> list[type]:
    return [root, *(cls for child in root.__subclasses__() for cls in tree(child))]


@pytest.mark.parametrize("kind", tree(errors.SlipstreamError), ids=lambda k: k.__name__)
def test_survives_the_wire_and_pickle(kind: type[errors.SlipstreamError]) -> None:
    error = kind("what happened", field="top_p")
    for copy in (
        errors.by_name(kind.__name__, error.message, error.field),
        pickle.loads(pickle.dumps(error)),
    ):
        assert type(copy) is kind
        assert (str(copy), copy.field, copy.status) == ("what happened", "top_p", error.status)


def test_an_unknown_kind_keeps_its_name() -> None:
    error = errors.by_name("Strange", "boom", "rank 3")
    assert type(error) is errors.SlipstreamError
    assert "Strange" in str(error) and error.field == "rank 3"


def test_callers_mistakes_are_value_errors() -> None:
    assert issubclass(errors.InvalidRequest, ValueError)
    assert errors.InvalidRequest("x").status == 400
