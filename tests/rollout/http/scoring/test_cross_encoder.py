"""/v1/score and /rerank over a small real classifier of one label, which reads pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.executor import build_executor
from tests.helpers.http_app import run, serving
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import BOS_ID, ids_of, tiny_tokenizer

TEXTS = ["cd", "xyz", "q"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineConfig, Any]:
    folder: Path = tmp_path_factory.mktemp("encoder")
    model = write_tiny(folder, classifier=True, num_labels=1, vocab_size=300)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "fits"}
    (folder / "config.json").write_text(json.dumps(config))
    cache = CacheConfig(num_pages=100, page_size=8)
    return EngineConfig(model=str(folder), device="cpu", dtype="float32", cache=cache), model


@torch.no_grad()
def logit(model: Any, one: str, two: str) -> float:
    ids = [BOS_ID, *ids_of(one), BOS_ID, *ids_of(two)]
    return float(model(torch.tensor([ids])).logits[0, 0])


def test_pairs_are_joined_as_the_tokenizer_joins_them(encoder: tuple[EngineConfig, Any]) -> None:
    config, model = encoder
    logits = [logit(model, "ab", text) for text in TEXTS]
    wanted = 1 / (1 + np.exp(-np.array(logits)))
    tokenizer = tiny_tokenizer(add_bos=True)

    async def test() -> None:
        async with serving(engine=config, executor=build_executor, tokenizer=tokenizer) as server:
            body: dict[str, Any] = {"text_1": "ab", "text_2": TEXTS}
            reply = (await server.post("/v1/score", body)).json()
            found = [entry["score"] for entry in reply["data"]]
            np.testing.assert_allclose(found, wanted, atol=1e-5)
            raw = (await server.post("/score", {**body, "use_activation": False})).json()
            np.testing.assert_allclose([e["score"] for e in raw["data"]], logits, atol=1e-4)
            ranked = (await server.post("/rerank", {"query": "ab", "documents": TEXTS})).json()
            order = [result["index"] for result in ranked["results"]]
            assert order == sorted(range(3), key=lambda index: -logits[index])
            label = (await server.post("/classify", {"input": "ab"})).json()["data"][0]
            assert label["label"] == "fits" and len(label["probs"]) == 1

    run(test)


def test_the_second_text_is_cut_and_the_first_is_not(encoder: tuple[EngineConfig, Any]) -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    body = {"text_1": "abc", "text_2": ["defghi", "d"], "truncate_prompt_tokens": 7}

    async def test() -> None:
        async with serving(
            engine=encoder[0], executor=build_executor, tokenizer=tokenizer
        ) as server:
            assert (await server.post("/v1/score", body)).status_code == 200
            first, second = (request.prompt_ids.tolist() for request in server.link.requests)
            assert first == [BOS_ID, *ids_of("abc"), BOS_ID, *ids_of("de")]
            assert second == [BOS_ID, *ids_of("abc"), BOS_ID, *ids_of("d")]
            reply = await server.post("/v1/score", {**body, "truncate_prompt_tokens": 5})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "text_2[0]")

    run(test)
