"""Held-out figures of a model that is being tuned: the loss, and right answers by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recipes.actors.actor import Actor
from recipes.collecting.collect import evaluate
from recipes.collecting.prompts import Prompts
from recipes.rewards.grading import Grading
from recipes.trainers.base import Learner
from recipes.tuning.examples import Example
from recipes.types import Problem
from recipes.world import World


@dataclass(kw_only=True)
class Asked:
    """A task whose held-out problems are answered by the engine."""

    actor: Actor
    prompts: Prompts
    grading: Grading
    problems: list[Problem]
    max_new_tokens: int

    def accuracy(self, trainer: Learner, step: int, world: World) -> float:
        """Mean reward of greedy replies under the weights after `step` steps; collective."""
        if step > self.actor.state().version:
            self.actor.push(trainer.weights, step, measure_memcpy=False)
        accuracy = evaluate(
            self.actor,
            self.prompts,
            self.problems,
            self.max_new_tokens,
            world,
            grader=self.grading,
        )
        self.actor.sleep()
        return accuracy


def heldout_loss(trainer: Learner, examples: Sequence[Example]) -> float:
    """Mean of -log p over the learnt tokens of the examples; collective."""
    logprobs = trainer.logprobs(tuple(example.trajectory() for example in examples))
    total = sum(
        float(values[example.kept()].sum())
        for values, example in zip(logprobs, examples, strict=True)
    )
    return -total / sum(example.num_learnt for example in examples)
