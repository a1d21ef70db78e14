"""GRPO: a language model learns a task from its own graded replies.

    python recipes/grpo.py --help
    torchrun --nproc-per-node 4 recipes/grpo.py --trainer deepspeed --zero 3

Each step, the engine samples several replies to each of a few problems; the task grades them; a
reply's advantage is how much better it did than the other replies to its problem; one optimizer
step makes better replies likelier; the engine takes the new weights in place.
DeepSeekMath, arXiv 2402.03300. The relatives of GRPO are rows of `algorithms/presets.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.algorithms.losses import policy_loss
from recipes.asynchrony.async_loop import train_async
from recipes.collecting.batching import minibatches
from recipes.run.batches import adapt_kl, algorithm_now, prepare
from recipes.run.command import run_recipe
from recipes.run.report import Collected
from recipes.run.run import Run
from recipes.run.sampling import sample_groups
from recipes.settings.options import RunOptions
from recipes.trainers.loss_scale import scale_figures
from recipes.trainers.metrics import TokenMetrics, merge
from recipes.types import Group
from recipes.world import leave
from rollout.offline import derive_seed


def train(run: Run) -> None:
    """The loop: rollout -> reward -> advantage -> loss -> step -> push. With --async it is that of
    `asynchrony/async_loop.py`, where rollouts do not wait for the rest."""
    if run.options.asynchrony.asynchronous:
        return train_async(run, update)
    while run.goes_on():
        collected = collect(run)
        with run.ledger.phase("sleep"):
            run.actor.sleep()
        with run.ledger.phase("train"):
            figures = update(run, collected.groups)
        with run.ledger.phase("push"):
            pushed = run.actor.push(
                run.trainer.weights,
                version=run.progress.step + 1,
                measure_memcpy=run.progress.step == 0,
            )
        run.finish_step(collected, figures, pushed)


def collect(run: Run) -> Collected:
    """Rollout and reward. With dynamic sampling, groups without spread are replaced, and what
    was sampled beyond a step's groups is trained on first in the next."""
    algorithm, wanted = run.algorithm, run.options.rollout.prompts_per_step
    result = Collected(groups=run.surplus, sampled=[])
    for _ in range(1 + algorithm.max_resamples * algorithm.dynamic_sampling):
        groups = sample_groups(run)
        result.sampled.extend(groups)
        result.groups.extend(g for g in groups if g.mixed or not algorithm.dynamic_sampling)
        if len(result.groups) >= wanted:
            break
    run.surplus = result.groups[wanted:]
    return dataclasses.replace(result, groups=result.groups[:wanted] or result.sampled[:wanted])


def update(run: Run, groups: Sequence[Group]) -> dict[str, float]:
    """Advantages, loss and optimizer steps: one, or `num_iterations` epochs of
    `num_minibatches`."""
    algorithm, trainer, metrics = algorithm_now(run), run.trainer, TokenMetrics()
    batch, figures = prepare(run, groups, algorithm)
    loss = functools.partial(policy_loss, algorithm=algorithm)
    lr, grad_norm = run.learning_rate(), 0.0
    for epoch in range(algorithm.num_iterations):
        seed = derive_seed(run.options.seed, "minibatches", run.progress.step, epoch)
        for part in minibatches(batch, algorithm, run.max_new_tokens, seed=seed):
            if trainer.accumulate(part, loss, metrics):
                grad_norm = trainer.step(lr)
    figures |= merge(run.world.gather([metrics])).result() | scale_figures(trainer.loss_scale)
    figures |= adapt_kl(run, batch, algorithm, figures)
    return {**figures, "grad_norm": grad_norm, "learning_rate": lr}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe. Returns the exit code: not 0 after an error, which is explained in a line."""
    return run_recipe(train, RunOptions(), argv)


if __name__ == "__main__":
    # Spawned engines inherit the path, where `types` of this folder would hide Python's own.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    leave(main())
