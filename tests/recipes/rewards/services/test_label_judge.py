"""A judge that is read: the probability of a label, from this project's own server."""

from __future__ import annotations

import asyncio
import math
from string import Template
from typing import Any

import httpx
import pytest

from engine.errors import InvalidRequest
from recipes.rewards.base import Grade
from recipes.rewards.services.judge import read_template
from recipes.rewards.services.label_judge import PROMPT, LabelJudge
from tests.helpers.http_app import run, serving
from tests.helpers.reward_items import items, kinds, told_by_deadline
from tests.helpers.stub_service import Answer, stub_service
from tests.helpers.tiny_tokenizer import ids_of, tiny_tokenizer

TEMPLATE = read_template(None, [], own=PROMPT, more=("labels",))
LABELS = ("y", "n")


def judge(url: str, labels: tuple[str, ...] = LABELS, **options: Any) -> LabelJudge:
    given = {"model": None, "template": TEMPLATE, "timeout_s": 60.0, **options}
    return LabelJudge(url, labels=labels, **given)


def grade(url: str, replies: list[str], **options: Any) -> list[Grade]:
    async def asked() -> list[Grade]:
        found = judge(url, **options)
        try:
            return await found.grade(items(replies))
        finally:
            await found.close()

    return asyncio.run(asked())


def test_the_reward_is_the_share_of_the_first_label() -> None:
    """The fake engine's logprob of token t is -t / 100, whatever comes before it."""
    first, second = (math.exp(-ids_of(label)[0] / 100) for label in LABELS)

    async def test() -> None:
        async with serving(served_model_name="mine") as server:
            transport = httpx.ASGITransport(app=server.app)
            found = judge("http://127.0.0.1/v1", model="mine", transport=transport)
            try:
                grades = await found.grade(items(["five", "4"]))
            finally:
                await found.close()
            assert grades == pytest.approx([first / (first + second)] * 2, rel=1e-5)
            prompts = [
                tiny_tokenizer().decode(request.prompt_ids, skip_special_tokens=False)
                for request in server.link.requests
            ]
            assert len(prompts) == 2
            for prompt, reply in zip(sorted(prompts), ("4", "five"), strict=True):
                assert f"\n{reply}\n" in prompt and "2+2=" in prompt and "y, n" in prompt
                assert prompt.endswith("<|im_start|>assistant\n")

    run(test)


def test_a_label_of_several_tokens_is_refused() -> None:
    async def test() -> None:
        async with serving() as server:
            transport = httpx.ASGITransport(app=server.app)
            found = judge("http://127.0.0.1/v1", ("yes", "n"), transport=transport)
            with pytest.raises(InvalidRequest, match="3 tokens") as caught:
                await found.grade(items(["4"]))
            assert caught.value.field == "judge_labels"
            await found.close()

    run(test)


@pytest.mark.parametrize(
    "answer, kind",
    [
        (Answer({"error": {"type": "InvalidRequest", "message": "no"}}, status=400), "http"),
        (Answer({"error": {"type": "ContextTooLong", "message": "no"}}, status=400), "too_long"),
        (Answer(b"<html>", status=404), "http"),
        (Answer({}, status=503), "http"),
        (Answer(b"{"), "unparsable"),
        (Answer({"tokens": ["a"]}), "unparsable"),
    ],
)
def test_what_gives_no_probability_is_a_failure(answer: Answer, kind: str) -> None:
    with stub_service(lambda body: answer) as stub:
        url = f"{stub.url}/v1"
        told = told_by_deadline(lambda timeout_s: grade(url, ["4"], timeout_s=timeout_s))
        assert kinds(told) == [kind]


def test_a_score_that_is_none_is_a_failure() -> None:
    def answer(body: Any) -> Answer:
        return Answer({"scores": []} if "query" in body else {"tokens": [1]})

    with stub_service(answer) as stub:
        options = {"template": Template("$reply")}
        told = told_by_deadline(
            lambda timeout_s: grade(stub.url, ["4"], timeout_s=timeout_s, **options)
        )
        assert kinds(told) == ["unparsable"]
