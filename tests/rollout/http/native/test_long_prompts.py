"""Prompts that are too long by their bytes, and those that only look so."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import ContextTooLong, InvalidRequest
from rollout.http.native import long_prompts
from rollout.http.native.long_prompts import check_long_prompt


@pytest.fixture(autouse=True)
def every_body_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_prompts, "_LONG_BYTES", 0)


def check(body: Any, *, text_bytes: int = 1000, num_ids: int = 100) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    check_long_prompt(data, text_bytes=text_bytes, num_ids=num_ids)


@pytest.mark.parametrize(
    "body",
    [
        {"text": "a" * 6001},
        {"stream": True, "text": "a" * 60_000, "rid": "x"},
        {"text": 'a"\\' * 6001},
        {"prompt": "a" * 6001},
        b'{"text": "' + b"a" * 7000,
    ],
)
def test_a_text_that_no_tokens_hold_is_refused(body: Any) -> None:
    with pytest.raises(ContextTooLong) as caught:
        check(body)
    assert caught.value.field in ("text", "prompt")


def test_a_model_without_text_takes_none() -> None:
    with pytest.raises(InvalidRequest, match="without a tokenizer"):
        check({"text": "a"}, text_bytes=0)


def test_too_many_ids_are_refused() -> None:
    for body in ({"input_ids": [7] * 101}, {"rid": "x", "input_ids": [7] * 1_000_000}):
        with pytest.raises(ContextTooLong) as caught:
            check(body)
        assert caught.value.field == "input_ids"


@pytest.mark.parametrize(
    "body",
    [
        {"text": "a" * 5990, "sampling_params": {"stop": ["b" * 9000]}},
        {"text": '"\\' * 1490},
        {"text": "\\" * 2000, "rid": "x" * 9000},
        {"text": ["a" * 7000, "b"]},
        {"input_ids": [7] * 100, "session_params": [1] * 500},
        {"input_ids": [[7] * 99] * 500},
        {"rid": '{"text": "' + "a" * 7000},
        {"rid": "y" * 5000, "text": "a" * 7000},
        b'{"text": "short',
        b"",
    ],
)
def test_what_may_fit_is_left_to_the_decoder(body: Any) -> None:
    check(body)
