"""Tasks made of a question generator and a few worked examples, verified by exact match."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from recipes.rewards.exact import exact_match
from recipes.types import Message, Problem


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """A procedurally generated task; an `Environment`.

    generate: draws one problem. examples: worked problems shown before each question; they are
    fixed, so that every prompt of the task shares its prefix, and are never drawn.
    instruction: system message; empty leaves the chat template its own default.
    """

    name: str
    max_new_tokens: int
    heldout_one_in: int
    generate: Callable[[random.Random], Problem]
    examples: tuple[Problem, ...]
    instruction: str = ""

    def draw(self, rng: random.Random) -> Problem:
        """A problem other than the worked examples."""
        shown = {example.key for example in self.examples}
        while True:
            problem = self.generate(rng)
            if problem.key not in shown:
                return problem

    def messages(self, problem: Problem) -> list[Message]:
        """System instruction if any, worked examples as turns of the chat, the question."""
        chat: list[Message] = []
        if self.instruction:
            chat.append({"role": "system", "content": self.instruction})
        for example in self.examples:
            chat.append({"role": "user", "content": example.question})
            chat.append({"role": "assistant", "content": example.answer})
        chat.append({"role": "user", "content": problem.question})
        return chat

    def verify(self, reply: str, problem: Problem) -> float:
        """1.0 if the reply is exactly the answer, white space around it aside."""
        return exact_match(reply, problem.answer)
