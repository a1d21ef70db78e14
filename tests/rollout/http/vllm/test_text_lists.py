"""/tokenize and /detokenize of several texts at once, in SGLang's form, and of chats."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.http_app import run, serving
from tests.helpers.tiny_tokenizer import BOS_ID, IM_START_ID, ids_of, tiny_tokenizer

TEXTS = ["ab", "", "cde"]


def test_several_texts_become_lists_and_come_back() -> None:
    async def test() -> None:
        async with serving(tokenizer=tiny_tokenizer(add_bos=True)) as server:
            for path in ("/tokenize", "/v1/tokenize"):
                asked = {"prompt": TEXTS, "return_token_strs": True}
                reply = (await server.post(path, asked)).json()
                assert reply["tokens"] == [[BOS_ID, *ids_of(text)] for text in TEXTS]
                assert reply["count"] == [3, 1, 4]
                assert reply["token_strs"][2] == ["<|bos|>", "c", "d", "e"]
            for path in ("/detokenize", "/v1/detokenize"):
                asked = {"tokens": reply["tokens"], "skip_special_tokens": True}
                assert (await server.post(path, asked)).json()["text"] == TEXTS
            asked["skip_special_tokens"] = False
            whole = (await server.post("/detokenize", asked)).json()
            assert whole["text"] == [f"<|bos|>{text}" for text in TEXTS]

    run(test)


def test_the_tokens_of_a_chat_have_their_strings() -> None:
    async def test() -> None:
        async with serving() as server:
            chat = {"messages": [{"role": "user", "content": "ab"}]}
            plain = (await server.post("/tokenize", chat)).json()
            assert plain["token_strs"] is None
            reply = (await server.post("/tokenize", {**chat, "return_token_strs": True})).json()
            assert reply["tokens"] == plain["tokens"]
            assert reply["token_strs"][0] == "<|im_start|>"
            assert reply["tokens"][0] == IM_START_ID

    run(test)


@pytest.mark.parametrize(
    "path, asked, field",
    [
        ("/tokenize", {"prompt": ["a", 1]}, "prompt[1]"),
        ("/tokenize", {"prompt": ["a", "b" * 100_000]}, "prompt"),
        ("/detokenize", {"tokens": [1, [2]]}, "tokens"),
        ("/detokenize", {"tokens": [[1], [300]]}, "tokens"),
        ("/detokenize", {"tokens": [[1] * 600]}, "tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(path: str, asked: dict[str, Any], field: str) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post(path, asked)
            assert (reply.status_code, reply.json()["error"]["field"]) == (400, field)

    run(test)
