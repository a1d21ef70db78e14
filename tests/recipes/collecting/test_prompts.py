"""Prompts of recipes: chats by the model's template, plain text where there is none."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from recipes.collecting.prompts import Prompts
from recipes.data.chat_style import ChatStyle
from recipes.types import Message, Problem
from tests.helpers.chat_templates import QWEN25, TOOL_LOOP
from tests.helpers.tiny_tokenizer import EOS_ID, tiny_tokenizer

PROBLEM = Problem(question="q", answer="a", key="k")


@dataclass(frozen=True)
class Chats:
    """A task with one conversation."""

    chat: list[Message]
    name: str = "chats"
    max_new_tokens: int = 8
    heldout_one_in: int = 8
    problem: Problem = field(default=PROBLEM)

    def draw(self, rng: random.Random) -> Problem:
        return self.problem

    def messages(self, problem: Problem) -> list[Message]:
        return self.chat

    def verify(self, reply: str, problem: Problem) -> float:
        return 0.0


def text_of(chat: list[dict[str, Any]], template: str | None) -> str:
    tokenizer = tiny_tokenizer(template=template)
    prompts = Prompts(Chats(chat), tokenizer, [EOS_ID])
    return tokenizer.decode(prompts.prompt_ids(PROBLEM), skip_special_tokens=False)


def test_a_chat_of_a_task_is_read_as_that_of_a_client() -> None:
    text = text_of(TOOL_LOOP, QWEN25)
    assert "<|im_start|>user\nWeather?<|im_end|>" in text
    assert '"arguments": {"city": "Zürich", "days": 2, "hourly": null}}' in text
    assert "None" not in text and "[{" not in text


def test_a_model_without_a_template_gets_a_line_a_turn() -> None:
    parts = [{"type": "text", "text": "2 + 2 ="}]
    chat = [
        {"role": "user", "content": "1 + 1 ="},
        {"role": "assistant", "content": "2", "refusal": None},
        {"role": "user", "content": parts},
    ]
    assert text_of(chat, None) == "1 + 1 = 2\n2 + 2 ="


def test_a_system_message_and_variables_reach_the_template() -> None:
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{{ mood }}"
    chat = [{"role": "user", "content": "q"}]
    tokenizer = tiny_tokenizer(template=template)
    style = ChatStyle(system="s", variables={"mood": "!"})
    prompts = Prompts(Chats(chat), tokenizer, [EOS_ID], style)
    text = tokenizer.decode(prompts.prompt_ids(PROBLEM), skip_special_tokens=False)
    assert text == "[system:s][user:q]!"
