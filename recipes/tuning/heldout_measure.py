"""Held-out figures of a model that is being tuned: the loss, and right answers by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recipes.actors.actor import Actor
from recipes.evaluation.measure import Evaluation
from recipes.rewards.grading import Grading
from recipes.trainers.base import Learner
from recipes.tuning.examples import Example


@dataclass(kw_only=True)
class Asked:
    """A task whose held-out problems, the only set of `evaluation`, are answered by the engine."""

    actor: Actor
    evaluation: Evaluation
    grading: Grading

    def accuracy(self, trainer: Learner, step: int) -> float:
        """Mean reward of greedy replies under the weights after `step` steps; collective."""
        if step > self.actor.state().version:
            self.actor.push(trainer.weights, step, measure_memcpy=False)
        accuracy = self.evaluation.measure(self.actor)["eval/accuracy"]
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
