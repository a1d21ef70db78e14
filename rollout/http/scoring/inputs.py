"""The prompts of bodies that have `input`, or `messages` in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from msgspec import Raw

from engine.errors import InvalidRequest
from rollout.http.chat.prompts import ChatPrompts
from rollout.http.native.generate_call import check_prompt, prompt_room
from rollout.http.openai.bodies import ChatBody, parse_openai, prompts_of
from rollout.http.scoring.bodies import (
    ChatForm,
    ClassifyBody,
    ClassifyChatBody,
    EmbeddingBody,
    EmbeddingChatBody,
)
from rollout.http.scoring.prompts import Prompt
from rollout.http.services import Services
from rollout.requests.json_types import decode_json

T = TypeVar("T", EmbeddingBody, ClassifyBody)
C = TypeVar("C", EmbeddingChatBody, ClassifyChatBody)


def parse_either(
    data: bytes, kind: type[T], chat_kind: type[C], prompts: ChatPrompts | None
) -> T | C:
    """The body, of the kind whose prompts it has. prompts: bounds the size of a conversation,
    before it is decoded. Raises InvalidRequest, also for both kinds at once."""
    fields: dict[str, Raw] = decode_json(data or b"{}", dict[str, Raw])
    given = {name for name in ("input", "messages") if bytes(fields.get(name, b"null")) != b"null"}
    if len(given) == 2:
        raise InvalidRequest("send either input or messages; both came", field="messages")
    if "messages" not in given:
        return parse_openai(data, kind)
    if prompts is None:
        raise InvalidRequest(
            "this model came without a tokenizer; send ids as input", field="messages"
        )
    prompts.check_size(len(data))
    return parse_openai(data, chat_kind)


async def prompts_of_either(
    services: Services, body: EmbeddingBody | ClassifyBody | ChatForm, num_bytes: int
) -> tuple[Sequence[Prompt], str]:
    """The prompts of a body of `num_bytes`, and the name of their field.

    `input` is a text, a list of texts, ids, or a list of lists of ids. `messages` are one
    conversation, which the chat template writes as a text (as vLLM embeds and classifies them).
    Raises InvalidRequest naming the field, or what the template does not know.
    """
    if isinstance(body, ChatForm):
        return [await _conversation(services, body, num_bytes)], "messages"
    check_prompt(body.input, prompt_room(services.engine.facts, services.tokenizer), "input")
    return await services.generator.parsed(prompts_of, body.input, "input"), "input"


async def _conversation(services: Services, body: ChatForm, num_bytes: int) -> str:
    assert services.prompts is not None, "a body with messages was parsed with their bounds"
    chat = ChatBody(
        messages=body.messages,
        add_generation_prompt=body.add_generation_prompt,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    return await services.prompts.text(chat, num_bytes)
