"""Tasks of the reasoning-gym library, by name; an optional extra."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InvalidRequest
from recipes.rewards.graders.worker import GraderSpec
from recipes.types import Message, Problem

NUM_ITEMS = 2**30
"""Length given to a procedural data set: items are made when asked for, from their index."""


@dataclass(kw_only=True)
class Gym:
    """A reasoning-gym data set; an `Environment`. The key is the question's text.

    The library's scorers give partial credit for a right answer inside other text, and want the
    item back: `indices` says where each question that was handed out is found again. A run grades
    beside itself (`GradedBeside`), since some of them evaluate what the model wrote.
    """

    task: str
    dataset: Any
    max_new_tokens: int = 128
    heldout_one_in: int = 8
    indices: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """See `Environment`."""
        return f"gym:{self.task}"

    def draw(self, rng: random.Random) -> Problem:
        """The item at a random index."""
        index = rng.randrange(NUM_ITEMS)
        entry = self.dataset[index]
        question = str(entry["question"])
        self.indices[question] = index
        return Problem(question=question, answer=str(entry["answer"]), key=question)

    def messages(self, problem: Problem) -> list[Message]:
        """The question as the one user turn."""
        return [{"role": "user", "content": problem.question}]

    @property
    def grader(self) -> GraderSpec:
        """See `GradedBeside`."""
        function = "recipes.environments.gym:score_reply"
        return GraderSpec(function=function, sample=(self.task, "0", ""))

    def grading(self, reply: str, problem: Problem) -> tuple[str, ...]:
        """See `GradedBeside`."""
        return (self.task, str(self.indices[problem.key]), reply)

    def verify(self, reply: str, problem: Problem) -> float:
        """The library's own score, in [0, 1]."""
        return _score(self.dataset, self.indices[problem.key], reply)


def score_reply(task: str, index: str, reply: str) -> float:
    """The library's score of a reply to the item at `index` of a task, in a grader's process."""
    return _score(_data_set(task), int(index), reply)


def _score(dataset: Any, index: int, reply: str) -> float:
    return float(dataset.score_answer(reply.strip(), entry=dataset[index]))


@functools.lru_cache(maxsize=1)
def _data_set(task: str) -> Any:
    return _create(task)


def _create(task: str) -> Any:
    """Items are a function of their index, so that every process has the same."""
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=0, size=NUM_ITEMS)


def load_gym(task: str) -> Gym:
    """The data set called `task`. InvalidRequest if the library or the task is missing."""
    try:
        dataset = _create(task)
    except ImportError as error:
        raise InvalidRequest(
            f"task: gym:{task} needs the reasoning-gym package: pip install -e '.[gym]'",
            field="task",
        ) from error
    except ValueError as error:
        raise InvalidRequest(f"task: gym:{task}: {error}", field="task") from error
    return Gym(task=task, dataset=dataset)
