"""Which examples a step learns: a function of the options and the step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from recipes.algorithms.aggregation import token_weights
from recipes.environments.base import Environment, problem_at
from recipes.settings.sft_options import SftOptions
from recipes.tuning.conversations import conversation
from recipes.tuning.examples import Example, ExampleWriter
from recipes.types import Batch
from rollout.offline import derive_seed

DEFAULT_STEPS = 50
"""Of a task without end, where neither steps nor epochs are given."""


class Examples(Protocol):
    """A stream of examples."""

    def at(self, position: int) -> Example:
        """The example at a position, from 0, without end."""
        ...


class ShuffledExamples:
    """The examples of a file, each once an epoch, in an order of the epoch's own; an `Examples`."""

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def at(self, position: int) -> Example:
        """See `Examples`."""
        epoch, index = divmod(position, len(self._examples))
        if epoch != self._epoch:
            generator = np.random.default_rng(derive_seed(self._seed, "epoch", epoch))
            self._epoch, self._order = epoch, generator.permutation(len(self._examples))
        return self._examples[int(self._order[index])]


class DrawnExamples:
    """The training problems of a task that makes them, with their answers; an `Examples`."""

    def __init__(self, environment: Environment, writer: ExampleWriter, seed: int) -> None:
        self._environment = environment
        self._writer = writer
        self._seed = seed

    def at(self, position: int) -> Example:
        """See `Examples`."""
        problem = problem_at(self._environment, "train", self._seed, position)
        return self._writer.example(conversation(self._environment, problem))


def num_examples(options: SftOptions, num_rows: int | None) -> int:
    """Examples of the whole run. num_rows: of the file that is trained on; None without one."""
    if options.steps is not None:
        return options.steps * options.batch_size
    if num_rows is None:
        return DEFAULT_STEPS * options.batch_size
    return math.ceil((1.0 if options.epochs is None else options.epochs) * num_rows)


def make_batch(examples: Sequence[Example]) -> Batch:
    """The examples of one update; its loss is the mean over all their learnt tokens."""
    trajectories = tuple(example.trajectory() for example in examples)
    lengths = [example.num_learnt for example in examples]
    return Batch(
        trajectories=trajectories,
        advantages=tuple(np.ones(len(t.response_ids), dtype=np.float32) for t in trajectories),
        weights=token_weights(lengths, "token-mean", max(lengths)),
        kept=tuple(example.kept() for example in examples),
    )
