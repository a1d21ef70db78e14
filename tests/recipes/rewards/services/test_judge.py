"""A judge: votes are averaged, what cannot be read is asked for again, and counts are exact."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.rewards.base import Grade
from recipes.rewards.services.judge import MOST_ASKED, Judge, parse_score, read_template
from recipes.rewards.services.retry import Retry
from tests.helpers.reward_items import SUM, items, kinds, told_by_deadline
from tests.helpers.stub_service import Answer, stub_service

pytest.importorskip("openai")


def said(content: Any, **message: Any) -> Answer:
    choice = {"index": 0, "finish_reason": "stop", "message": {"content": content, **message}}
    return Answer({"id": "1", "object": "chat.completion", "model": "stub", "choices": [choice]})


def grade(
    url: str, replies: list[str], *, votes: int = 1, timeout_s: float = 60.0, model: str = "stub"
) -> list[Grade]:
    async def run() -> list[Grade]:
        template = read_template(None, [])
        judge = Judge(
            f"{url}/v1", model=model or None, template=template, votes=votes, timeout_s=timeout_s
        )
        try:
            return await judge.grade(items(replies))
        finally:
            await judge.close()

    return asyncio.run(run())


def shown(body: Any) -> str:
    return str(body["messages"][0]["content"])


def test_a_judge_sees_question_answer_and_reply_and_gives_a_score() -> None:
    with stub_service(lambda body: said(' {"score": 0.25}\n')) as stub:
        assert grade(stub.url, ["five"], model="") == [0.25]
    ((path, body),) = stub.asked
    assert path == "/v1/chat/completions" and body["model"] == "stub"
    assert "response_format" not in body
    for text in ("2+2=", "\n4\n", "\nfive\n"):
        assert text in shown(body)


def test_a_schema_is_asked_for_where_that_is_said() -> None:
    async def run(url: str) -> list[Grade]:
        template = read_template(None, [])
        judge = Judge(url, model="stub", template=template, votes=1, timeout_s=60.0, schema=True)
        try:
            return await judge.grade(items(["4"]))
        finally:
            await judge.close()

    with stub_service(lambda body: said('{"score": 1}')) as stub:
        assert asyncio.run(run(f"{stub.url}/v1")) == [1.0]
    asked = stub.asked[0][1]["response_format"]
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["schema"]["required"] == ["score"]


def test_votes_are_averaged_over_those_that_can_be_read() -> None:
    scores = {0: said('{"score": 1}'), 1: said("I think 0.7"), 2: said('{"score": 0.5}')}
    with stub_service(lambda body: scores[body["seed"]]) as stub:
        assert grade(stub.url, ["4"], votes=3) == [0.75]
    assert Counter(body["seed"] for _, body in stub.asked) == {0: 1, 1: MOST_ASKED, 2: 1}
    assert {body["temperature"] for _, body in stub.asked} == {1.0}


@pytest.mark.parametrize(
    "answer,kind,times",
    [
        (said("great"), "unparsable", MOST_ASKED),
        (said('{"score": 2}'), "unparsable", MOST_ASKED),
        (said(None, refusal="no"), "unparsable", MOST_ASKED),
        (Answer({"choices": []}), "unparsable", MOST_ASKED),
        (Answer({"error": None}), "unparsable", MOST_ASKED),
        (Answer([1]), "unparsable", MOST_ASKED),
        (Answer(b"{not json"), "unparsable", MOST_ASKED),
        (Answer(b"<html>"), "unparsable", MOST_ASKED),
        (Answer({}, status=500), "http", MOST_ASKED),
        (Answer({"error": {"message": "who?"}}, status=401), "http", 1),
    ],
)
def test_what_cannot_be_read_is_a_failure(answer: Answer, kind: str, times: int) -> None:
    with stub_service(lambda body: answer) as stub:
        assert kinds(grade(stub.url, ["4"])) == [kind]
        assert len(stub.asked) == times


def test_a_mixed_batch_has_exact_counts() -> None:
    """Every kind of trouble at once, some of which passes."""
    times: Counter[str] = Counter()
    forever = {"garbage": said("?"), "broken": Answer({}, status=503)}
    once = {"late": Answer({}, status=500), "unsure": said("hm")}

    def answer(body: Any) -> Answer:
        reply = shown(body).split("<reply>\n")[1].split("\n")[0]
        kind = reply.split()[0]
        times[reply] += 1
        if kind in forever:
            return forever[kind]
        if kind in once and times[reply] == 1:
            return once[kind]
        return said('{"score": 1.0}')

    replies = [f"{kind} {n}" for n in range(5) for kind in ("good", *forever, *once)]
    with stub_service(answer) as stub:
        grades = grade(stub.url, replies)
    assert Counter(kinds(grades)) == {1.0: 15, "unparsable": 5, "http": 5}
    assert len(stub.asked) == 5 * (1 + 2 * MOST_ASKED + 2 * 2)


def test_a_judge_that_says_nothing_or_is_away_is_a_failure_at_the_deadline() -> None:
    with stub_service(lambda body: Answer({}, delay_s=1.5)) as stub:
        assert kinds(grade(stub.url, ["4"], timeout_s=0.3)) in (["timeout"], ["http"])
    told = told_by_deadline(lambda timeout_s: grade(stub.url, ["4"], timeout_s=timeout_s))
    assert kinds(told) == ["http"]


@pytest.mark.parametrize(
    "text", ["", "1", "[1]", '{"score": "1"}', '{"score": true}', '{"score": NaN}', "[" * 100_000]
)
def test_only_an_object_with_a_score_in_0_1_is_one(text: str) -> None:
    assert isinstance(parse_score(text), Retry)


def test_a_prompt_of_ones_own_shows_columns(tmp_path: Path) -> None:
    path = tmp_path / "judge.txt"
    path.write_text('Level $level, say {"score": 1} for $$5: $reply')
    template = read_template(str(path), [SUM])
    assert template.substitute(level=3, reply="x") == 'Level 3, say {"score": 1} for $5: x'


@pytest.mark.parametrize(
    "text,told",
    [
        ("$reply $colour", r"asks for \$colour; there are \$answer, \$level"),
        ("$reply costs 5$", "without a name"),
        ("Good?", "does not show the reply"),
        (None, "No such file"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(tmp_path: Path, text: Any, told: str) -> None:
    path = tmp_path / "judge.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidRequest, match=told) as caught:
        read_template(str(path), [SUM])
    assert caught.value.field == "judge_prompt"
