"""What `--reward` may say, and several of them."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidRequest
from recipes.rewards.named_rewards import open_grading
from recipes.rewards.reward_options import RewardOptions, check_reward_options
from tests.helpers.char_model import CharAddition
from tests.helpers.reward_items import SUM, items, kinds
from tests.helpers.stub_service import Answer, stub_service


def test_without_a_name_the_task_grades() -> None:
    for names in ((), ("task",)):
        grading = open_grading(RewardOptions(reward=names), CharAddition(), [SUM])
        assert grading(items(["4", "5"])) == [1.0, 0.0]
        grading.close()
        grading.close()


def test_several_are_added_and_each_may_fail() -> None:
    with stub_service(lambda body: Answer({"rewards": [0.5, 0.25, None]})) as stub:
        options = RewardOptions(reward=("task", stub.url))
        grading = open_grading(options, CharAddition(), [SUM])
        assert kinds(grading(items(["4", "5", "4"]))) == [1.5, 0.25, "http"]
        grading.close()


@pytest.mark.slow
def test_a_second_one_that_cannot_be_opened_leaves_nothing_of_the_first() -> None:
    good = "tests.helpers.odd_graders:leading_digit"
    options = RewardOptions(reward=(good, "tests.helpers.odd_graders:none"))
    with pytest.raises(InvalidRequest, match="no function none"):
        open_grading(options, CharAddition(), [SUM])


@pytest.mark.parametrize(
    "name,told",
    [
        ("reward.py", "is none of"),
        ("nothing_here.py:score", "there is no file nothing_here.py"),
        ("nothing_here.py:", "is none of"),
        (":score", "is none of"),
        ("a b:score", "is none of"),
        ("", "is none of"),
        ("http://", "is no address"),
        ("http://host:port/x", "is no address"),
        ("judge:somewhere", "'somewhere' is no address"),
        ("judge:", "'' is no address"),
    ],
)
def test_what_is_no_reward_is_refused_by_name(name: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as caught:
        check_reward_options(RewardOptions(reward=(name,)))
    assert caught.value.field == "reward"


@pytest.mark.parametrize(
    "name", ["task", "pkg.mod:score", "http://localhost:80/a", "https://a", "judge:http://a:1/v1"]
)
def test_what_may_be_a_reward_is_left_to_be_opened(name: str) -> None:
    check_reward_options(RewardOptions(reward=(name,)))


def test_a_judge_is_opened_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    seen: list[Any] = []

    def answer(body: Any) -> Answer:
        seen.append(body)
        return Answer({"choices": [{"message": {"content": '{"score": 0.5}'}}]})

    with stub_service(answer) as stub:
        options = RewardOptions(reward=(f"judge:{stub.url}/v1",), judge_votes=2, judge_model="m")
        grading = open_grading(options, CharAddition(), [SUM])
        assert grading(items(["4"])) == [0.5]
        grading.close()
    assert [body["model"] for body in seen] == ["m", "m"]
