"""PPO: a language model learns a task from its own graded replies, token by token.

    python recipes/ppo.py --help
    torchrun --nproc-per-node 4 recipes/ppo.py --trainer deepspeed --zero 3

Each step, the engine samples a reply to each of many problems; the task grades them; a critic says
what it expected of a reply at each of its tokens, and a token's advantage is how much better it
came out; a few clipped optimizer steps make better tokens likelier and the critic wiser; the engine
takes the new weights in place. Schulman et al., arXiv 1707.06347; Ziegler et al., arXiv 1909.08593.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.algorithms.losses import policy_loss
from recipes.collecting.batching import minibatches
from recipes.run.batches import adapt_kl, algorithm_now, prepare
from recipes.run.command import run_recipe
from recipes.run.report import Collected
from recipes.run.run import Run
from recipes.run.sampling import sample_groups
from recipes.settings.options import PpoOptions
from recipes.trainers.loss_scale import scale_figures
from recipes.trainers.metrics import TokenMetrics, merge
from recipes.types import Group
from recipes.world import leave
from rollout.offline import derive_seed


def train(run: Run) -> None:
    """The loop: rollout -> reward -> values -> advantage -> losses -> steps -> push."""
    while run.goes_on():
        groups = sample_groups(run)
        with run.ledger.phase("sleep"):
            run.actor.sleep()
        with run.ledger.phase("train"):
            figures = update(run, groups)
        with run.ledger.phase("push"):
            pushed = run.actor.push(
                run.trainer.weights,
                version=run.progress.step + 1,
                measure_memcpy=run.progress.step == 0,
            )
        run.finish_step(Collected(groups=groups, sampled=groups), figures, pushed)


def update(run: Run, groups: Sequence[Group]) -> dict[str, float]:
    """Values, advantages, losses, and the optimizer steps: `num_iterations` epochs of
    `num_minibatches`. The first steps of a run train the critic alone."""
    algorithm, trainer, critic, metrics = (
        algorithm_now(run),
        run.trainer,
        run.critic,
        TokenMetrics(),
    )
    assert critic is not None
    batch, figures = prepare(run, groups, algorithm)
    loss = functools.partial(policy_loss, algorithm=algorithm)
    lr, grad_norm = run.learning_rate(), 0.0
    critic_alone = run.progress.step < critic.warmup_steps
    for epoch in range(algorithm.num_iterations):
        seed = derive_seed(run.options.seed, "minibatches", run.progress.step, epoch)
        for part in minibatches(batch, algorithm, run.max_new_tokens, seed=seed):
            if critic.own or critic_alone:
                figures["critic/grad_norm"] = critic.fit(part, metrics, lr)
            # The value loss of a critic on the policy's network is a part of this one.
            if not critic_alone and trainer.accumulate(part, loss, metrics):
                grad_norm = trainer.step(lr)
    figures |= merge(run.world.gather([metrics])).result() | scale_figures(trainer.loss_scale)
    if not critic_alone:
        figures |= adapt_kl(run, batch, algorithm, figures)
    return {**figures, "grad_norm": grad_norm, "learning_rate": lr, "critic/lr": critic.lr(lr)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe. Returns the exit code: not 0 after an error, which is explained in a line."""
    return run_recipe(train, PpoOptions(), argv)


if __name__ == "__main__":
    # Spawned engines inherit the path, where `types` of this folder would hide Python's own.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    leave(main())
