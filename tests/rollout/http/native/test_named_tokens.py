"""`token_ids_logprob` of `/generate`: logprobs of tokens that the caller names."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.http_app import events, run, serving

FOUR = {"max_new_tokens": 4}


@pytest.mark.parametrize(
    "ids,want",
    [
        ([7, 8], [[7, 8], [7, 8]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
        ([None, [9]], [None, [9]]),
        ([], [None, None]),
        (None, [None, None]),
    ],
)
def test_named_tokens_are_those_of_all_items_or_of_each(ids: Any, want: list[Any]) -> None:
    async def test() -> None:
        async with serving() as server:
            body = {
                "input_ids": [[1], [2]],
                "sampling_params": FOUR,
                "return_logprob": True,
                "token_ids_logprob": ids,
            }
            replies = (await server.post("/generate", body)).json()
            for reply, named in zip(replies, want, strict=True):
                rows = reply["meta_info"].get("output_token_ids_logprobs")
                found = None if rows is None else [[entry[1] for entry in row] for row in rows]
                assert found == (None if named is None else [named] * 4)

    run(test)


@pytest.mark.parametrize("incremental", [False, True])
def test_a_stream_has_the_named_tokens_of_what_it_has(incremental: bool) -> None:
    async def test() -> None:
        async with serving(incremental_streaming_output=incremental) as server:
            body = {
                "input_ids": [1, 2],
                "sampling_params": FOUR,
                "return_logprob": True,
                "logprob_start_len": 0,
                "token_ids_logprob": [7],
                "stream": True,
            }
            metas = [
                frame["meta_info"]
                for frame in events((await server.post("/generate", body)).text)[:-1]
            ]
            parts = [meta["output_token_ids_logprobs"] for meta in metas]
            whole = [row for part in parts for row in part] if incremental else parts[-1]
            entry = [pytest.approx(-0.07), 7, None]
            assert whole == [[entry]] * 4
            assert metas[0]["input_token_ids_logprobs"] == [None, [entry]]

    run(test)
