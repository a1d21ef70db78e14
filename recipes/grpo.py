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
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.algorithms.losses import policy_loss
from recipes.collecting.batching import minibatches
from recipes.collecting.collect import rollout, score
from recipes.run.batches import adapt_kl, algorithm_now, prepare
from recipes.run.failures import report_failure
from recipes.run.ledger import Ledger
from recipes.run.opening import open_run
from recipes.run.report import Collected
from recipes.run.run import Run
from recipes.settings.command_line import parse
from recipes.trainers.loss_scale import scale_figures
from recipes.trainers.metrics import TokenMetrics, merge
from recipes.types import Group
from recipes.world import launched_rank, leave
from rollout.offline import derive_seed


def train(run: Run) -> None:
    """The loop: rollout -> reward -> advantage -> loss -> step -> push."""
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
        seed = derive_seed(run.options.seed, "rollout", run.progress.position)
        problems, first = run.next_problems()
        with run.ledger.phase("generate"):
            replies = rollout(
                run.actor,
                run.prompts,
                problems,
                run.sampling,
                samples=run.options.rollout.samples,
                greedy=algorithm.needs_greedy,
                seed=seed,
                first=first,
            )
            run.world.barrier()
        with run.ledger.phase("score"):
            groups = run.world.gather(
                score(
                    run.prompts,
                    problems,
                    replies,
                    overlong_buffer=algorithm.overlong_buffer,
                    greedy=algorithm.needs_greedy,
                    grader=run.grading,
                )
            )
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
    ledger, folder = Ledger(), None
    level = logging.WARNING if launched_rank() else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        with open_run(options, ledger) as run:
            folder = run.folder
            run.begin()
            train(run)
            summary = run.finish()
    except (Exception, KeyboardInterrupt) as error:
        code = report_failure(error, folder)
        if code is None:
            raise
        return code
    logging.getLogger(__name__).info(
        "held-out accuracy %.3f -> %.3f in %d steps, %.0f s; see %s",
        *(summary[key] for key in ("eval_before", "eval_after", "steps", "seconds")),
        folder.path,
    )
    return 0


if __name__ == "__main__":
    # Spawned engines inherit the path, where `types` of this folder would hide Python's own.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    leave(main())
