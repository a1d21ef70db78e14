"""Logits that are not finite, as clients of both dialects and of `offline` see them."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.offline import run_file
from tests.helpers.fake_executor import NOT_FINITE, expected_tokens
from tests.helpers.http_app import events, run, serving, until
from tests.helpers.replicas import inline

BAD, GOOD = [NOT_FINITE, 5], [6, 5]
SIX = {"max_new_tokens": 6}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "path,body",
    [
        ("/generate", {"input_ids": BAD, "sampling_params": SIX}),
        ("/v1/completions", {"prompt": BAD, "max_tokens": 6}),
    ],
)
def test_a_reply_is_a_typed_500_and_the_next_one_is_served(path: str, body: Any, n: int) -> None:
    async def test() -> None:
        async with serving() as server:
            if path == "/generate":
                sent = {**body, "sampling_params": {**SIX, "n": n}}
            else:
                sent = {**body, "n": n}
            reply = await server.post(path, sent)
            assert reply.status_code == 500
            assert "NonFiniteLogits" in reply.text
            await until(server.link.leader.idle)
            good = await server.post("/generate", {"input_ids": GOOD, "sampling_params": SIX})
            assert good.json()["output_ids"] == expected_tokens(GOOD, 6)
            server.link.leader._scheduler.check_integrity()

    run(test)


@pytest.mark.parametrize("n", [1, 3])
def test_a_native_stream_has_its_tokens_and_then_the_error(n: int) -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": BAD, "sampling_params": {**SIX, "n": n}, "stream": True}
            found = events((await server.post("/generate", body)).text)
            assert found[-1] is None and found[-2]["error"]["type"] == "NonFiniteLogits"
            assert found[-2]["error"]["code"] == 500
            assert len(found) > 2
            longest = max((f["output_ids"] for f in found[:-2]), key=len)
            assert longest == expected_tokens(BAD, 2)

    run(test)


def test_an_openai_stream_has_an_error_frame() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"prompt": BAD, "max_tokens": 6, "stream": True}
            found = events((await server.post("/v1/completions", body)).text)
            assert found[-1] is None and "NonFiniteLogits" in json.dumps(found[-2])
            chat = {
                "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 3,
                "stream": True,
            }
            good = events((await server.post("/v1/chat/completions", chat)).text)
            assert all("error" not in frame for frame in good[:-1])

    run(test)


def test_a_batch_with_one_bad_item_is_a_500_and_leaves_nothing_running() -> None:
    async def test() -> None:
        async with serving() as server:
            body = {"input_ids": [GOOD, BAD], "sampling_params": {"max_new_tokens": 400}}
            reply = await server.post("/generate", body)
            assert reply.status_code == 500
            await until(server.link.leader.idle)

    run(test)


def test_a_file_shows_it_at_the_sample_and_answers_the_others(tmp_path: Path) -> None:
    lines = [
        {"input_ids": GOOD, "sampling_params": SIX},
        {"input_ids": BAD, "sampling_params": SIX, "return_logprob": True},
        {"input_ids": BAD, "sampling_params": {**SIX, "n": 2}},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with inline() as replica:
        report = run_file(replica, None, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    good, bad, many = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert good["output_ids"] == expected_tokens(GOOD, 6)
    for reply in (bad, *many):
        reason = reply["meta_info"]["finish_reason"]
        assert (reason["type"], reason["error"]) == ("abort", "NonFiniteLogits")
        assert reply["output_ids"] == expected_tokens(BAD, 2)
    assert len(bad["meta_info"]["output_token_logprobs"]) == 2
    assert report.num_errors == 2
