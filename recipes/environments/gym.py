"""Tasks of the reasoning-gym library, by name; an optional extra."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequest
from recipes.types import Message, Problem

NUM_ITEMS = 2**30
"""Length given to a procedural data set: items are made when asked for, from their index."""


@dataclass(kw_only=True)
class Gym:
    """A reasoning-gym data set; an `Environment`. The key is the question's text.

    The library's scorers give partial credit for a right answer inside other text. `entries` are
    the items handed out, which the scorer wants back.
    """

    name: str
    dataset: Any
    max_new_tokens: int = 128
    heldout_one_in: int = 8
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def draw(self, rng: random.Random) -> Problem:
        """The item at a random index."""
        entry = self.dataset[rng.randrange(NUM_ITEMS)]
        question = str(entry["question"])
        self.entries[question] = entry
        return Problem(question=question, answer=str(entry["answer"]), key=question)

    def messages(self, problem: Problem) -> list[Message]:
        """The question as the one user turn."""
        return [{"role": "user", "content": problem.question}]

    def verify(self, reply: str, problem: Problem) -> float:
        """The library's own score, in [0, 1]."""
        return float(self.dataset.score_answer(reply.strip(), entry=self.entries[problem.key]))


def load_gym(task: str) -> Gym:
    """The data set called `task`. InvalidRequest if the library or the task is missing."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise InvalidRequest(
            f"task: gym:{task} needs the reasoning-gym package: pip install -e '.[gym]'",
            field="task",
        ) from error
    try:
        dataset = reasoning_gym.create_dataset(task, seed=0, size=NUM_ITEMS)
    except ValueError as error:
        raise InvalidRequest(f"task: gym:{task}: {error}", field="task") from error
    return Gym(name=f"gym:{task}", dataset=dataset)
