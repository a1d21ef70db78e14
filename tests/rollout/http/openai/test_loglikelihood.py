"""Loglikelihoods by `echo`, as evaluation harnesses ask for them, equal transformers'."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from rollout.ranks.ranked_executor import build_executor
from tests.helpers.engines import exact_logprobs
from tests.helpers.http_app import Server, run, serving
from tests.helpers.tiny_models import write_tiny
from tests.helpers.token_families import byte_level

VOCAB = 280
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineConfig, Any]:
    folder: Path = tmp_path_factory.mktemp("model")
    model = write_tiny(folder, vocab_size=VOCAB)
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=200, page_size=4),
        # Prompts longer than a chunk are scored in parts.
        scheduler=SchedulerConfig(max_running=16, max_step_tokens=32, max_chunk_tokens=16),
    )
    return config, model


def problems() -> list[tuple[list[int], list[int]]]:
    """A context and four continuations each, some of them the same; one context of one token."""
    rng = random.Random(0)
    found = []
    for size in (1, 2, 17, 40):
        context = [rng.randrange(VOCAB) for _ in range(size)]
        for length in (1, 3, 9, 9):
            found.append((context, [rng.randrange(VOCAB) for _ in range(length)]))
    return found


async def scores(server: Server, prompts: list[list[int]], max_tokens: int) -> list[Any]:
    """`logprobs` of each choice."""
    body = {
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    reply = await server.post("/v1/completions", body)
    assert reply.status_code == 200, reply.text
    choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
    return [choice["logprobs"] for choice in choices]


def greedy(model: Any, context: list[int], continuation: list[int]) -> bool:
    """Whether `continuation` is the likeliest, token by token."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0]
    return logits[len(context) - 1 : -1].argmax(-1).tolist() == continuation


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_continuations_have_the_loglikelihoods_of_transformers(
    served: tuple[EngineConfig, Any], max_tokens: int
) -> None:
    config, model = served
    asked = problems()
    # One that is greedy, which a random model never makes of random tokens.
    context = asked[-1][0]
    with torch.no_grad():
        likeliest = int(model(torch.tensor([context])).logits[0, -1].argmax())
    asked.append((context, [likeliest]))

    async def test() -> None:
        async with serving(
            engine=config, executor=build_executor, tokenizer=byte_level()
        ) as server:
            found = await scores(server, [[*a, *b] for a, b in asked], max_tokens)
        for (context, continuation), logprobs in zip(asked, found, strict=True):
            end = len(context) + len(continuation)
            assert {len(column) for column in logprobs.values()} == {end + max_tokens}
            values = logprobs["token_logprobs"][len(context) : end]
            want = exact_logprobs(model, context, continuation)
            np.testing.assert_allclose(values, want, atol=TOLERANCE)
            assert abs(sum(values) - float(want.sum())) < TOLERANCE
            tops = logprobs["top_logprobs"][len(context) : end]
            likely = [value == max(top.values()) for value, top in zip(values, tops, strict=True)]
            assert all(likely) == greedy(model, context, continuation)
            # The whole prompt but its first token, which nothing precedes.
            first, *rest = logprobs["token_logprobs"][:end]
            assert first is None
            whole = exact_logprobs(model, context[:1], [*context[1:], *continuation])
            np.testing.assert_allclose(rest, whole, atol=TOLERANCE)

    run(test)


def test_a_text_is_scored_as_its_tokens_are(served: tuple[EngineConfig, Any]) -> None:
    config, model = served
    tokenizer = byte_level()

    async def test() -> None:
        async with serving(engine=config, executor=build_executor, tokenizer=tokenizer) as server:
            body = {"prompt": "a is é🎉", "max_tokens": 0, "logprobs": 0, "echo": True}
            (choice,) = (await server.post("/v1/completions", body)).json()["choices"]
        assert choice["text"] == "a is é🎉"
        ids = tokenizer.encode("a is é🎉")
        want = exact_logprobs(model, ids[:1], ids[1:])
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][1:], want, atol=TOLERANCE)
        assert choice["logprobs"]["text_offset"][-1] == len("a is é")

    run(test)
