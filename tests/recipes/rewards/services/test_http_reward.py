"""A reward behind HTTP: the wire, and whatever may go wrong on it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from recipes.rewards.base import Grade
from recipes.rewards.services.http_reward import MAX_ITEMS, HttpReward
from tests.helpers.reward_items import items, kinds, told_by_deadline
from tests.helpers.stub_service import Answer, stub_service


def grade(url: str, replies: list[str], timeout_s: float = 60.0) -> list[Grade]:
    async def run() -> list[Grade]:
        reward = HttpReward(url, timeout_s=timeout_s)
        try:
            return await reward.grade(items(replies))
        finally:
            await reward.close()

    return asyncio.run(run())


def test_the_wire() -> None:
    with stub_service(lambda body: Answer({"rewards": [0.5, None, True]})) as stub:
        assert kinds(grade(f"{stub.url}/grade", ["4", "5", "6"])) == [0.5, "http", 1.0]
    (path, body) = stub.asked[0]
    assert path == "/grade" and list(body) == ["items"]
    assert body["items"][1] == {
        "prompt": "2+2=",
        "messages": [{"role": "user", "content": "2+2="}],
        "reply": "5",
        "answer": "4",
        "columns": {"level": 3},
    }


def test_many_replies_go_in_several_requests_and_come_back_in_order() -> None:
    def answer(body: Any) -> Answer:
        return Answer({"rewards": [float(item["reply"]) for item in body["items"]]})

    with stub_service(answer) as stub:
        replies = [str(n) for n in range(2 * MAX_ITEMS + 3)]
        assert grade(stub.url, replies) == [float(n) for n in replies]
        assert sorted(len(body["items"]) for _, body in stub.asked) == [3, MAX_ITEMS, MAX_ITEMS]
        assert grade(stub.url, []) == []


@pytest.mark.parametrize(
    "answer,kind",
    [
        (Answer({"rewards": [1.0]}), "unparsable"),
        (Answer({"rewards": [1.0] * 3}), "unparsable"),
        (Answer({"rewards": {"0": 1.0}}), "unparsable"),
        (Answer([1.0, 1.0]), "unparsable"),
        (Answer(b"<html>"), "unparsable"),
        (Answer(b"\xff\xfe\x00"), "unparsable"),
        (Answer(b"[" * 100_000), "unparsable"),
        (Answer({"detail": "no"}, status=404), "http"),
        (Answer(b'{"rewards": [NaN, 1e999]}'), "not_finite"),
        (Answer({"rewards": ["1.0", [1.0]]}), "not_a_number"),
    ],
)
def test_a_wrong_answer_fails_for_all_its_replies_at_once(answer: Answer, kind: str) -> None:
    with stub_service(lambda body: answer) as stub:
        assert kinds(grade(stub.url, ["4", "5"])) == [kind, kind]
        assert len(stub.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_service_in_trouble_is_asked_again(status: int) -> None:
    answers = iter([Answer({}, status=status), Answer({}, status=status)])
    with stub_service(lambda body: next(answers, Answer({"rewards": [1.0]}))) as stub:
        assert grade(stub.url, ["4"]) == [1.0]
        assert len(stub.asked) == 3


def test_a_service_that_stays_in_trouble_or_away_is_a_failure_at_the_deadline() -> None:
    with stub_service(lambda body: Answer({}, status=500)) as stub:
        (failed,) = told_by_deadline(partial(grade, stub.url, ["4"]))
        assert kinds([failed]) == ["http"] and "status 500" in str(failed)
    (failed,) = told_by_deadline(partial(grade, stub.url, ["4"]))
    assert kinds([failed]) == ["http"] and "ConnectError" in str(failed)


def test_a_service_that_says_nothing_is_a_timeout() -> None:
    with stub_service(lambda body: Answer({"rewards": [1.0]}, delay_s=1.5)) as stub:
        (failed,) = grade(stub.url, ["4"], timeout_s=0.3)
    assert kinds([failed]) in (["timeout"], ["http"])
    assert "no answer in 0.3 s" in str(failed) or "Timeout" in str(failed)
