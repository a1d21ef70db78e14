"""From problems to token ids, and from reply ids to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from engine.protocol import IntArray
from recipes.data.chat_style import ChatStyle
from recipes.environments.base import Environment
from recipes.types import Message, Problem
from rollout.offline import normalised_messages


class PromptTokenizer(Protocol):
    """What prompts need of a tokenizer; `rollout.offline.load_tokenizer` returns one."""

    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, ids: Any) -> str:
        """Text of ids, special tokens left out."""
        ...

    def apply_chat_template(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Ids of a chat that ends where the assistant's reply begins. variables: for the
        template."""
        ...


class Prompts:
    """Writes the problems of a task for one model.

    A model with a chat template gets a chat; any other gets plain text, a line a turn, and its
    reply ends at the end of the line.
    eos_ids: tokens that end a reply of this model. style: what is around every prompt.
    """

    def __init__(
        self,
        environment: Environment,
        tokenizer: PromptTokenizer,
        eos_ids: Sequence[int],
        style: ChatStyle | None = None,
    ) -> None:
        self.environment = environment
        self.style = style or ChatStyle()
        self.tokenizer = tokenizer
        self.is_chat = tokenizer.chat_template is not None
        newline = () if self.is_chat else (tokenizer.encode("\n")[-1],)
        self.stop_ids = sorted({*eos_ids, *newline})

    def messages(self, problem: Problem) -> list[Message]:
        """The chat that asks a problem, as the model and what grades its replies see it."""
        return self.style.led(self.environment.messages(problem))

    def prompt_ids(self, problem: Problem) -> IntArray:
        """int32 [prompt_len]. Raises InvalidRequest for a chat that the template refuses, and for
        one with a system message beside that of `style`."""
        messages = self.messages(problem)
        if self.is_chat:
            ids = self.tokenizer.apply_chat_template(messages, **self.style.variables)
        else:
            ids = self.tokenizer.encode(plain_text(messages))
        return np.asarray(ids, dtype=np.int32)

    def reply_text(self, response_ids: IntArray) -> str:
        """What the model said, without the token that ended it."""
        if len(response_ids) and int(response_ids[-1]) in self.stop_ids:
            response_ids = response_ids[:-1]
        return self.tokenizer.decode(response_ids)


def plain_text(messages: Sequence[Message]) -> str:
    """A chat for a model without a template: each answer on the line of its question, the last
    question left open."""
    text = ""
    for message in normalised_messages(messages):
        ends_line = message["role"] != "user"
        text += str(message["content"]) + ("\n" if ends_line else " ")
    return text.rstrip(" ")
