"""The asynchronous loop: the policy learns from what is whole, and rollouts go on meanwhile.

With a staleness of 0 its steps are those of the loop of `grpo.py`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from recipes.asynchrony.feeder import Feeder
from recipes.asynchrony.open_stream import open_stream
from recipes.asynchrony.version_lag import lag_figures
from recipes.run.report import Collected
from recipes.run.run import Run
from recipes.types import Group

Update = Callable[[Run, Sequence[Group]], dict[str, float]]
"""Advantages, loss and optimizer steps of one batch; its figures."""


def train_async(run: Run, update: Update) -> None:
    """Top up, wait for a batch, learn from it, publish; what is under way goes on with the new
    weights, behind the tokens that it has."""
    stream, in_background = open_stream(run)
    with closing(Feeder(run, stream, in_background=in_background)) as feeder:
        while run.goes_on():
            with run.ledger.phase("generate"):
                groups = next_batch(feeder)
            with run.ledger.phase("train"):
                figures = update(run, groups)
            with run.ledger.phase("generate"):
                feeder.during_update()
            with run.ledger.phase("push"):
                pushed = run.actor.push(
                    run.trainer.weights,
                    version=run.progress.step + 1,
                    measure_memcpy=run.progress.step == 0,
                )
            pauses = run.pauses_after_step()
            if pauses:
                feeder.set_aside()
            figures |= lag_figures(groups, run.progress.step) | feeder.figures()
            collected = Collected(groups=groups, sampled=feeder.take_sampled())
            run.finish_step(collected, figures, pushed)
            if pauses:
                feeder.resume()
        feeder.set_aside()


def next_batch(feeder: Feeder) -> list[Group]:
    """Wait until a batch is to be trained."""
    feeder.top_up()
    while not feeder.trains():
        feeder.advance()
        feeder.top_up()
    return feeder.pop_batch()
