"""/v1/score and /rerank over the fake engine, which embeds and generates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rollout.http.scoring import label_scores, prompts
from tests.helpers.fake_executor import expected_embedding
from tests.helpers.http_app import run, serving
from tests.helpers.tiny_tokenizer import ids_of

LABELS = [7, 40, 41]
# The fake engine's logprob of token t is -t / 100, whatever comes before it.
LIKELIHOODS = [math.exp(-label / 100) for label in LABELS]


def cosine(one: str, two: str, pooling: str = "last") -> float:
    first, second = (expected_embedding(ids_of(text), pooling) for text in (one, two))
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(
    "first, second, pairs",
    [
        ("ab", "cd", [("ab", "cd")]),
        ("ab", ["cd", "e", "ab"], [("ab", "cd"), ("ab", "e"), ("ab", "ab")]),
        (["ab"], ["cd", "e"], [("ab", "cd"), ("ab", "e")]),
        (["ab", "e"], ["cd", "ab"], [("ab", "cd"), ("e", "ab")]),
    ],
)
def test_a_model_that_embeds_scores_by_cosine(
    path: str, first: Any, second: Any, pairs: list[tuple[str, str]]
) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = (await server.post(path, {"text_1": first, "text_2": second})).json()
            assert [entry["index"] for entry in reply["data"]] == list(range(len(pairs)))
            for entry, pair in zip(reply["data"], pairs, strict=True):
                assert entry["object"] == "score"
                assert entry["score"] == pytest.approx(cosine(*pair), abs=1e-6)
            # Each text is embedded once.
            texts = {text for pair in pairs for text in pair}
            assert len(server.link.requests) == len(texts)
            assert reply["usage"]["total_tokens"] == sum(map(len, texts))

    run(test)


def test_labels_are_read_behind_the_prompt_in_one_step() -> None:
    async def test() -> None:
        async with serving() as server:
            body: dict[str, Any] = {"query": "ab", "items": ["c", ""], "label_token_ids": LABELS}
            reply = (await server.post("/v1/score", body)).json()
            assert reply["object"] == "scoring" and len(reply["scores"]) == 2
            for row in reply["scores"]:
                assert row == pytest.approx(LIKELIHOODS, rel=1e-5)
            prompts = [request.prompt_ids.tolist() for request in server.link.requests]
            assert prompts == [ids_of("abc"), ids_of("ab")]
            assert all(request.sampling.max_new_tokens == 1 for request in server.link.requests)
            assert reply["usage"]["completion_tokens"] == 0
            assert reply["usage"]["total_tokens"] == 5
            reply = (await server.post("/score", {**body, "apply_softmax": True})).json()
            share = [one / sum(LIKELIHOODS) for one in LIKELIHOODS]
            assert reply["scores"][0] == pytest.approx(share, rel=1e-5)

    run(test)


def test_items_may_stand_first_and_both_may_be_ids() -> None:
    async def test() -> None:
        async with serving() as server:
            for body, wanted in (
                ({"query": "ab", "items": "c", "item_first": True}, ids_of("cab")),
                ({"query": [5, 6], "items": [[7]]}, [5, 6, 7]),
                ({"query": [5, 6], "items": [[]]}, [5, 6]),
                ({"query": [5, 6], "items": [7, 8], "item_first": True}, [7, 8, 5, 6]),
            ):
                reply = await server.post("/v1/score", {**body, "label_token_ids": [3]})
                assert reply.status_code == 200, reply.text
                assert server.link.requests[-1].prompt_ids.tolist() == wanted

    run(test)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_come_best_first(path: str) -> None:
    documents: list[Any] = ["cd", {"text": "ab"}, "xyz", "cd"]
    texts = ["cd", "ab", "xyz", "cd"]
    scores = [cosine("ab", text) for text in texts]
    order = sorted(range(4), key=lambda index: -scores[index])

    async def test() -> None:
        async with serving() as server:
            body = {"query": "ab", "documents": documents, "model": "default"}
            reply = (await server.post(path, body)).json()
            assert [result["index"] for result in reply["results"]] == order
            assert reply["results"][0]["relevance_score"] == pytest.approx(1.0)
            for result in reply["results"]:
                assert result["document"] == {"text": texts[result["index"]]}
            body |= {"top_n": 2, "return_documents": False}
            reply = (await server.post(path, body)).json()
            assert [result["index"] for result in reply["results"]] == order[:2]
            assert set(reply["results"][0]) == {"index", "relevance_score"}

    run(test)


@pytest.mark.parametrize(
    "path, options, is_list",
    [
        ("/v1/rerank", {"rerank_form": "list"}, True),
        ("/rerank", {"rerank_form": "list"}, True),
        ("/v2/rerank", {"rerank_form": "list"}, False),
        ("/v1/rerank", {}, False),
    ],
)
def test_the_server_is_told_the_form_of_ranks(
    path: str, options: dict[str, Any], is_list: bool
) -> None:
    body: dict[str, Any] = {"query": "ab", "documents": ["cd", "ab", "cd"], "top_n": 2}

    async def test() -> None:
        async with serving(**options) as server:
            reply = (await server.post(path, body)).json()
            assert isinstance(reply, list) == is_list
            listed = (await server.post(path, {**body, "form": "list"})).json()
            found = reply if is_list else listed
            assert [entry["index"] for entry in found] == [1, 0]
            assert [entry["document"] for entry in found] == ["ab", "cd"]
            scores = [entry["score"] for entry in found]
            assert scores == pytest.approx([1.0, cosine("ab", "cd")], abs=1e-6)
            for entry in found:
                assert entry["meta_info"]["prompt_tokens"] == 2
                assert entry["meta_info"]["weight_version"] == "0"
            plain = {**body, "form": "results", "return_documents": False}
            assert len((await server.post(path, plain)).json()["results"]) == 2
            bare = await server.post(path, {**plain, "form": "list"})
            assert set(bare.json()[0]) == {"score", "index", "meta_info"}

    run(test)


@pytest.mark.parametrize(
    "path, body, field",
    [
        ("/rerank", {"query": "a", "documents": ["b"], "form": "table"}, "form"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "instruct": "c"}, "instruct"),
        ("/v1/score", {"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ("/v1/score", {}, "text_1"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", ""]}, "text_2[1]"),
        ("/v1/score", {"text_1": "", "text_2": "b"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "c" * 600]}, "text_2[1]"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "query": "c"}, "query"),
        ("/v1/score", {"query": "a"}, "items"),
        ("/v1/score", {"query": "a", "items": ["b"]}, "label_token_ids"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": []}, "label_token_ids"),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [300]}, "label_token_ids"),
        ("/v1/score", {"query": "a", "items": [[1]], "label_token_ids": [3]}, "items"),
        ("/v1/score", {"query": "a", "items": ["b" * 511], "label_token_ids": [3]}, "items"),
        ("/v1/score", {"query": "a", "items": ["b"] * 4001, "label_token_ids": [3]}, "items"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b", "c" * 600]}, "documents[1]"),
        ("/rerank", {"query": "a" * 600, "documents": ["b"]}, "query"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["x"]}, "rank_fields"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path: str, body: dict[str, Any], field: str) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(path, body)
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == field

    run(test)


def test_a_query_before_very_many_texts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_scores, "_MOST", 100)
    monkeypatch.setattr(prompts, "_MOST_TOKENS", 100)
    labels = {"query": "a" * 30, "items": ["b", "c"], "label_token_ids": [3]}
    ranks = {"query": "a" * 60, "documents": ["b" * 30, "c" * 30]}

    async def test() -> None:
        async with serving() as server:
            assert (await server.post("/v1/score", labels)).status_code == 200
            reply = await server.post("/v1/score", {**labels, "items": ["b", "c", "d", "e"]})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "items")
            assert (await server.post("/rerank", ranks)).status_code == 200
            ranks["documents"] += ["d" * 50]
            reply = await server.post("/rerank", ranks)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "documents[2]")

    run(test)


def test_labels_that_cannot_come_have_no_part() -> None:
    impossible = np.full(2, -np.inf, np.float32)
    assert label_scores.among(impossible) == [0.5, 0.5]
    assert label_scores.among(np.array([-1.0, -np.inf], np.float32)) == [1.0, 0.0]
    assert label_scores.likelihoods(impossible) == [0.0, 0.0]
