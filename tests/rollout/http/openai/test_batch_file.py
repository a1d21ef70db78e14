"""Files of OpenAI's batch format: what the routes answer, line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineDead
from rollout.files.jsonl import read_lines
from rollout.http.config import ServeConfig
from rollout.http.openai.batch_file import run_batch
from rollout.offline import FileReport, is_batch
from tests.helpers.fake_executor import expected_embedding, expected_tokens
from tests.helpers.http_app import run, serving
from tests.helpers.replicas import fake_config, spawned
from tests.helpers.tiny_tokenizer import ids_of, tiny_tokenizer

pytestmark = pytest.mark.slow

TOKENIZER = tiny_tokenizer()
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0.0}
TEXT = {"prompt": "abc", "max_tokens": 4, "return_token_ids": True}


def line(custom_id: str, url: str, body: Any, **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def completion(custom_id: str, **body: Any) -> dict[str, Any]:
    return line(custom_id, "/v1/completions", {**TEXT, **body})


def answer(
    folder: Path, lines: list[Any], model: str = "fake", **options: Any
) -> tuple[list[dict[str, Any]], FileReport]:
    texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in lines]
    (folder / "in").write_text("".join(text + "\n" for text in texts))
    config = ServeConfig(engine=fake_config(model), served_model_name="mine")
    with spawned(model, **options) as replica:
        report = run_batch(replica, TOKENIZER, config, folder / "in", folder / "out", seed=7)
    return [json.loads(text) for text in (folder / "out").read_text().splitlines()], report


def test_lines_are_answered_as_a_server_answers_their_bodies(tmp_path: Path) -> None:
    lines = [
        completion("a", model="mine"),
        line("b", "/v1/chat/completions", CHAT),
        completion("c", prompt=["abc", "abcd"], n=2),
    ]
    replies, report = answer(tmp_path, lines)
    assert [reply["custom_id"] for reply in replies] == ["a", "b", "c"]
    assert all(set(reply) == {"id", "custom_id", "response", "error"} for reply in replies)
    assert len({reply["id"] for reply in replies}) == 3
    assert [reply["error"] for reply in replies] == [None] * 3
    responses = [reply["response"] for reply in replies]
    assert all(set(found) == {"status_code", "request_id", "body"} for found in responses)
    assert [found["status_code"] for found in responses] == [200] * 3
    bodies = [found["body"] for found in responses]
    assert bodies[0]["choices"][0]["token_ids"] == expected_tokens(ids_of("abc"), 4)
    assert [choice["index"] for choice in bodies[2]["choices"]] == [0, 1, 2, 3]

    async def served() -> None:
        async with serving(tokenizer=TOKENIZER, served_model_name="mine") as server:
            want = (await server.post("/v1/chat/completions", CHAT)).json()
            for name in ("object", "model", "choices", "usage"):
                assert bodies[1][name] == want[name]

    run(served)
    used = [body["usage"] for body in bodies]
    assert report == FileReport(
        num_lines=3,
        num_errors=0,
        num_prompt_tokens=sum(usage["prompt_tokens"] for usage in used),
        num_output_tokens=sum(usage["completion_tokens"] for usage in used),
    )


def test_an_error_of_a_request_is_the_response_of_its_route(tmp_path: Path) -> None:
    bad = [
        (completion("a", model="other"), 404, "UnknownModel"),
        (completion("b", temperature=-1), 400, "InvalidRequest"),
        (completion("c", stream=True), 400, "InvalidRequest"),
        (completion("d", prompt="x" * 600), 400, "ContextTooLong"),
        (line("e", "/v1/completions", [1]), 400, "InvalidRequest"),
        (completion("f", suffix="x"), 400, "UnsupportedOption"),
    ]
    replies, report = answer(tmp_path, [*(entry for entry, *_ in bad), completion("g")])
    for reply, (_, status, kind) in zip(replies[:-1], bad, strict=True):
        assert reply["error"] is None
        response = reply["response"]
        assert (response["status_code"], response["body"]["error"]["type"]) == (status, kind)
    assert replies[-1]["response"]["status_code"] == 200
    assert (report.num_lines, report.num_errors) == (7, 6)


def test_a_line_that_names_no_request_has_an_error_of_its_own(tmp_path: Path) -> None:
    lines = [
        completion("a"),
        "{broken",
        line("b", "/v1/images", {}),
        completion("c") | {"method": "GET"},
        {"custom_id": "d", "url": "/v1/completions"},
        {"url": "/v1/completions", "body": TEXT},
        {**completion("e"), "custom_id": 5},
        completion("a"),
        {"text": "abc"},
        "",
        completion("f"),
    ]
    replies, report = answer(tmp_path, lines)
    assert len(replies) == 10
    assert [reply["custom_id"] for reply in replies] == [
        "a", None, "b", "c", "d", None, None, "a", None, "f",
    ]  # fmt: skip
    for number, reply in enumerate(replies[1:-1], 2):
        assert reply["response"] is None
        assert reply["error"]["code"] == "invalid_request"
        assert f"in:{number}: " in reply["error"]["message"]
    assert (report.num_lines, report.num_errors) == (10, 8)


def test_whatever_a_line_holds_the_others_are_answered(tmp_path: Path) -> None:
    """Text that nothing can write again, and nesting that one reader follows and another does
    not."""
    deep = [
        f'{{"custom_id": "{depth}", "url": "/v1/completions", "body": '
        + '{"prompt": ' + "[" * depth + "]" * depth + "}}"
        for depth in (99, 300, 800, *range(900, 1000, 3), 3000, 30_000)
    ]  # fmt: skip
    lines = [
        '{"custom_id": "\\ud800", "url": "/v1/completions", "body": {}}',
        '{"custom_id": "a\\udc00", "url": "/v1/completions"}',
        '{"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "\\ud800"}}',
        *deep,
        completion("c"),
    ]
    replies, report = answer(tmp_path, lines)
    assert [reply["custom_id"] for reply in replies[:3]] == [None, None, None]
    assert all("half of a surrogate pair" in reply["error"]["message"] for reply in replies[:3])
    for reply in replies[3:-1]:
        status = 400 if reply["error"] else reply["response"]["status_code"]
        assert status == 400, reply
    assert replies[-1]["response"]["status_code"] == 200
    assert report.num_errors == len(lines) - 1


def test_texts_are_embedded_in_a_file(tmp_path: Path) -> None:
    replies, report = answer(
        tmp_path,
        [
            line("a", "/v1/embeddings", {"input": ["abc", "d"], "normalize": False}),
            line("b", "/v1/embeddings", {"input": "a", "dimensions": 99}),
        ],
    )
    good, bad = (reply["response"] for reply in replies)
    for entry, text in zip(good["body"]["data"], ("abc", "d"), strict=True):
        wanted = expected_embedding(ids_of(text))
        assert entry["embedding"] == pytest.approx(wanted.tolist())
    assert (bad["status_code"], bad["body"]["error"]["param"]) == (400, "dimensions")
    assert (report.num_prompt_tokens, report.num_output_tokens, report.num_errors) == (4, 0, 1)


def test_a_null_is_no_field_and_a_refusal_says_what_a_line_has(tmp_path: Path) -> None:
    lines = [
        completion("a") | {"method": None},
        line("b", "/v1/images", {}),
        completion("c") | {"custom_id": None},
    ]
    replies, _ = answer(tmp_path, lines)
    assert replies[0]["response"]["status_code"] == 200
    for reply, told in zip(replies[1:], ("/v1/images", "custom_id"), strict=True):
        message = reply["error"]["message"]
        assert told in message and "/v1/completions or /v1/embeddings" in message


def test_seeds_come_from_the_lines_number(tmp_path: Path) -> None:
    """What is drawn depends neither on the other lines nor on when each was answered."""
    sampled = completion("b", prompt=["abc", "abc"], temperature=1.0, seed=None)
    first, _ = answer(tmp_path, [completion("a", n=8), sampled])
    again, _ = answer(tmp_path, [completion("a", max_tokens=1), sampled])
    texts = [replies[1]["response"]["body"]["choices"] for replies in (first, again)]
    assert texts[0] == texts[1]


def test_lines_that_a_full_queue_refuses_are_sent_again(tmp_path: Path) -> None:
    lines = [completion(str(number), n=4, max_tokens=2) for number in range(100)]
    replies, report = answer(tmp_path, lines, max_waiting=8)
    assert [reply["custom_id"] for reply in replies] == [str(number) for number in range(100)]
    assert report.num_errors == 0


def test_a_death_leaves_finished_lines_on_disk(tmp_path: Path) -> None:
    with pytest.raises(EngineDead):
        answer(tmp_path, [{"custom_id": "a", "url": "/v1/x"}, completion("b")], model="die")
    (reply,) = (tmp_path / "out").read_text().splitlines()
    assert json.loads(reply)["custom_id"] == "a"


@pytest.mark.parametrize(
    "text,batch",
    [
        ("", False),
        ('{"text": "a"}\n', False),
        ('{broken\n{"custom_id": "a"}\n', True),
        ('\n{"url": "/v1/completions"}\n{"text": "a"}\n', True),
    ],
)
def test_which_files_are_batches(text: str, batch: bool, tmp_path: Path) -> None:
    (tmp_path / "in").write_text(text)
    assert is_batch(read_lines(tmp_path / "in", field="input")) is batch
