"""`best_of` of completions: the likeliest of several, by the mean of their logprobs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.http_app import run, serving
from tests.helpers.scripted_replies import scripted

# A token's logprob is its id over -100, and "!" is 0: what is told by the mean, not by the sum.
TEXTS = ("zz", "!!!!!!!!!z", "aa")


def test_the_likeliest_come_first() -> None:
    async def test() -> None:
        async with serving(**scripted(*TEXTS)) as server:
            body: dict[str, Any] = {"prompt": ["p", "q"], "max_tokens": 20, "logprobs": 0}
            reply = await server.post("/v1/completions", {**body, "best_of": 3, "n": 2})
            assert reply.status_code == 200, reply.text
            found = reply.json()
            assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
            assert [choice["text"] for choice in found["choices"]] == [TEXTS[1], TEXTS[2]] * 2
            for choice in found["choices"]:
                assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"])
            # What was drawn counts, whether or not it is shown.
            assert found["usage"]["completion_tokens"] == 2 * sum(len(text) + 1 for text in TEXTS)
            plain = await server.post("/v1/completions", {**body, "best_of": 3, "n": 3})
            assert [choice["text"] for choice in plain.json()["choices"][:3]] == [
                TEXTS[1], TEXTS[2], TEXTS[0],
            ]  # fmt: skip

    run(test)


@pytest.mark.parametrize(
    ("path", "more", "kind"),
    [
        ("completions", {"best_of": 2, "n": 3}, "InvalidRequest"),
        ("completions", {"best_of": 10**6}, "InvalidRequest"),
        ("completions", {"best_of": 2, "stream": True}, "UnsupportedOption"),
        ("chat/completions", {"best_of": 2}, "UnsupportedOption"),
    ],
)
def test_what_cannot_be_chosen(path: str, more: dict[str, Any], kind: str) -> None:
    async def test() -> None:
        async with serving(**scripted("a")) as server:
            chat = {"messages": [{"role": "user", "content": "a"}]}
            body = chat if path.startswith("chat") else {"prompt": "a"}
            reply = await server.post(f"/v1/{path}", {**body, **more})
            assert reply.status_code == 400, reply.text
            assert (reply.json()["error"]["param"], reply.json()["error"]["type"]) == (
                "best_of", kind,
            )  # fmt: skip

    run(test)
