"""A reward model behind a URL: a served classifier, and servers that answer otherwise."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.errors import InvalidRequest
from engine.executor import build_executor
from recipes.rewards.base import Grade
from recipes.rewards.reward_models.model_chat import ModelChat
from recipes.rewards.reward_models.open_reward_model import served_tokenizer
from recipes.rewards.reward_models.reward_server import RewardServer
from tests.helpers.http_app import run, serving
from tests.helpers.reward_items import items, kinds, told_by_deadline
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

REPLIES = ["4", "5", "four"]


def test_a_served_classifier_grades(tmp_path: Path) -> None:
    model = write_tiny(tmp_path, classifier=True, num_labels=1, vocab_size=300)
    cache = CacheConfig(num_pages=100, page_size=8)
    config = EngineConfig(model=str(tmp_path), device="cpu", dtype="float32", cache=cache)
    chat = ModelChat(tiny_tokenizer())
    with torch.no_grad():
        rows = [torch.tensor(chat.ids(item)).long() for item in items(REPLIES)]
        wanted = [float(model(row[None]).logits[0, 0]) for row in rows]

    async def test() -> None:
        async with serving(engine=config, executor=build_executor) as server:
            transport = httpx.ASGITransport(app=server.app)
            reward = RewardServer(
                "http://127.0.0.1", tiny_tokenizer(), timeout_s=30.0, transport=transport
            )
            found = await reward.grade(items([*REPLIES, "x" * 200]))
            np.testing.assert_allclose(found[:3], wanted, atol=1e-4)
            assert kinds(found[3:]) == ["too_long"]
            await reward.close()
            await reward.close()

    run(test)


def grades(answer: Any, timeout_s: float = 0.5, **options: Any) -> list[Grade]:
    async def ask() -> list[Grade]:
        transport = httpx.MockTransport(answer)
        reward = RewardServer(
            "http://host", tiny_tokenizer(), timeout_s=timeout_s, transport=transport, **options
        )
        try:
            return await reward.grade(items(REPLIES))
        finally:
            await reward.close()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "reply, kind",
    [
        (httpx.Response(200, json={"embedding": [1.5, -2.0]}), -2.0),
        (httpx.Response(200, json={"embedding": [1.5]}), "unparsable"),
        (httpx.Response(200, json={"embedding": []}), "unparsable"),
        (httpx.Response(200, json=[1, 2]), "unparsable"),
        (httpx.Response(200, text="hello"), "unparsable"),
        (httpx.Response(200, text='{"embedding": [1, NaN]}'), "not_finite"),
        (httpx.Response(200, json={"embedding": [1, "x"]}), "not_a_number"),
        (httpx.Response(503, text="busy"), "http"),
        (httpx.Response(400, json={"error": {"type": "ContextTooLong"}}), "too_long"),
        (httpx.Response(400, json={"error": "no"}), "http"),
    ],
)
def test_what_a_server_says_is_a_score_or_a_failure(reply: httpx.Response, kind: Any) -> None:
    told = told_by_deadline(partial(grades, lambda request: reply, label=1))
    assert kinds(told) == [kind] * 3


def test_a_server_that_is_late_or_gone_is_a_failure() -> None:
    def late(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("late", request=request)

    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone", request=request)

    assert kinds(grades(late)) == ["timeout"] * 3
    assert kinds(told_by_deadline(partial(grades, gone))) == ["http"] * 3


@pytest.mark.parametrize("url", ["host:30000", "ftp://host", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="http://HOST:PORT") as caught:
        RewardServer(url, tiny_tokenizer(), timeout_s=30.0)
    assert caught.value.field == "reward"


def info(**fields: Any) -> httpx.MockTransport:
    return httpx.MockTransport(lambda request: httpx.Response(200, json=fields))


def test_the_tokenizer_is_that_of_the_folder_that_the_server_names(tmp_path: Path) -> None:
    tiny_tokenizer().write_hf(tmp_path)
    found = served_tokenizer("http://host", info(is_generation=False, model_path=str(tmp_path)))
    assert found.encode("4") == tiny_tokenizer().encode("4")


@pytest.mark.parametrize(
    "transport, field",
    [
        (info(is_generation=True), "reward"),
        (info(is_generation=False, model_path="/absent/elsewhere"), "reward_tokenizer"),
        (info(), "reward_tokenizer"),
        (httpx.MockTransport(lambda request: httpx.Response(404)), "reward"),
        (httpx.MockTransport(lambda request: httpx.Response(200, text="x")), "reward"),
    ],
)
def test_a_server_that_cannot_grade_is_refused_before_the_run(
    transport: httpx.MockTransport, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        served_tokenizer("http://host", transport)
    assert caught.value.field == field
