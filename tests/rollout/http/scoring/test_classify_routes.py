"""POST /classify over a small real classifier, and what models refuse that do the other thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.executor import build_executor
from rollout.offline import run_file
from tests.helpers.engines import make_replica
from tests.helpers.http_app import run, serving
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TEXTS = ["ab", "cab"]


def config_of(folder: Path) -> EngineConfig:
    cache = CacheConfig(num_pages=100, page_size=8)
    return EngineConfig(model=str(folder), device="cpu", dtype="float32", cache=cache)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("classifier")
    vocab_size = max(300, tiny_tokenizer().vocab_size)
    return folder, write_tiny(folder, classifier=True, num_labels=2, vocab_size=vocab_size)


@torch.no_grad()
def wanted(model: Any, ids: list[int]) -> list[float]:
    return model(torch.tensor([ids])).logits[0].tolist()


def test_texts_and_ids_are_scored_alone_and_in_batches(classifier: tuple[Path, Any]) -> None:
    folder, model = classifier
    ids = [tiny_tokenizer().encode(text) for text in TEXTS]

    async def test() -> None:
        async with serving(engine=config_of(folder), executor=build_executor) as server:
            one = await server.post("/classify", {"text": TEXTS[0], "model": "any", "rid": "r"})
            assert one.status_code == 200, one.text
            assert one.json()["meta_info"]["id"] == "r"
            assert one.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
            assert one.json()["meta_info"]["prompt_tokens"] == len(ids[0])
            np.testing.assert_allclose(one.json()["embedding"], wanted(model, ids[0]), atol=1e-4)
            for body in ({"text": TEXTS}, {"input_ids": ids}):
                many = (await server.post("/classify", body)).json()
                assert len(many) == 2
                for reply, own in zip(many, ids, strict=True):
                    np.testing.assert_allclose(reply["embedding"], wanted(model, own), atol=1e-4)
                    assert reply["meta_info"]["weight_version"] == "0"

    run(test)


@pytest.mark.parametrize(
    "body, field",
    [
        ({"text": "ab", "sampling_params": {"max_new_tokens": 3}}, "sampling_params"),
        ({"text": "ab", "return_logprob": True}, "return_logprob"),
        ({"text": "ab", "stream": True}, "stream"),
        ({"text": "ab", "txt": "ab"}, "txt"),
        ({"text": "ab", "model": 3}, "model"),
        ({"text": []}, "text"),
        ({"input_ids": [[5], [1 << 20]]}, "[1].input_ids"),
        ({"input_ids": [5] * 1000}, "input_ids"),
        ({}, "text, input_ids"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    body: dict[str, Any], field: str, classifier: tuple[Path, Any]
) -> None:
    async def test() -> None:
        async with serving(engine=config_of(classifier[0]), executor=build_executor) as server:
            reply = await server.post("/classify", body)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == field

    run(test)


@pytest.mark.parametrize(
    "path, body",
    [
        ("/generate", {"input_ids": [5, 6]}),
        ("/v1/completions", {"prompt": [5, 6]}),
        ("/inference/v1/generate", {"token_ids": [5, 6], "sampling_params": {"max_tokens": 2}}),
    ],
)
def test_a_classifier_does_not_generate(
    path: str, body: dict[str, Any], classifier: tuple[Path, Any]
) -> None:
    async def test() -> None:
        async with serving(engine=config_of(classifier[0]), executor=build_executor) as server:
            reply = await server.post(path, body)
            assert reply.status_code == 400, reply.text
            assert "sequence classifier" in reply.text and "/classify" in reply.text
            assert (await server.get("/health_generate")).status_code == 200

    run(test)


def test_a_model_that_generates_does_not_classify() -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post("/classify", {"text": "ab"})
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == "task"
            assert "ForSequenceClassification" in reply.text

    run(test)


def test_offline_says_on_every_line_that_a_classifier_does_not_generate(
    classifier: tuple[Path, Any], tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input_ids": [5, 6]}\n')
    with make_replica(classifier[0]) as replica:
        report = run_file(replica, None, source, out)
    assert report.num_errors == 1
    assert "sequence classifier" in out.read_text()


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_an_input_gets_a_label(path: str, classifier: tuple[Path, Any]) -> None:
    folder, model = classifier
    ids = [tiny_tokenizer().encode(text) for text in TEXTS]

    async def test() -> None:
        async with serving(engine=config_of(folder), executor=build_executor) as server:
            for given in (TEXTS, ids):
                reply = (await server.post(path, {"input": given})).json()
                assert reply["object"] == "list"
                for entry, own in zip(reply["data"], ids, strict=True):
                    probs = torch.tensor(wanted(model, own)).softmax(0)
                    np.testing.assert_allclose(entry["probs"], probs, atol=1e-4)
                    assert entry["label"] == f"LABEL_{int(probs.argmax())}"
                    assert entry["num_classes"] == 2 and entry["weight_version"] == "0"
            raw = (await server.post(path, {"input": "ab", "use_activation": False})).json()
            np.testing.assert_allclose(raw["data"][0]["probs"], wanted(model, ids[0]), atol=1e-4)
            assert raw["usage"]["total_tokens"] == len(ids[0])
            chat = [{"role": "user", "content": "ab"}]
            written = tiny_tokenizer().apply_chat_template(chat, add_generation_prompt=False)
            reply = (await server.post(path, {"messages": chat, "use_activation": False})).json()
            found = reply["data"][0]["probs"]
            np.testing.assert_allclose(found, wanted(model, written), atol=1e-4)

    run(test)


@pytest.mark.parametrize(
    "path, body, told",
    [
        ("/v1/embeddings", {"input": "ab"}, "can only classify"),
        ("/encode", {"text": "ab"}, "can only classify"),
        (
            "/v1/score",
            {"query": "a", "items": ["b"], "label_token_ids": [5]},
            "can only classify",
        ),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, "2 scores"),
        ("/rerank", {"query": "a", "documents": ["b"]}, "2 scores"),
    ],
)
def test_a_classifier_says_what_it_can_do(
    path: str, body: dict[str, Any], told: str, classifier: tuple[Path, Any]
) -> None:
    async def test() -> None:
        async with serving(engine=config_of(classifier[0]), executor=build_executor) as server:
            reply = await server.post(path, body)
            assert reply.status_code == 400, reply.text
            assert told in reply.text and "/classify" in reply.text

    run(test)


def test_a_model_that_embeds_labels_nothing() -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post("/v1/classify", {"input": "ab"})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
            assert "can only generate and embed" in reply.text

    run(test)
