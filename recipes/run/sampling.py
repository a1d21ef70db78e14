"""One round of rollouts and rewards of a run, as its recipes begin a step."""

from __future__ import annotations

from recipes.collecting.collect import rollout, score
from recipes.run.run import Run
from recipes.types import Group
from rollout.offline import derive_seed


def sample_groups(run: Run) -> list[Group]:
    """Replies to the next problems of the training stream, graded, a group a problem; those of all
    processes. Collective."""
    algorithm = run.algorithm
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
            routes=run.options.routing.routing_replay,
            entropy=run.options.keep_entropy,
        )
        run.world.barrier()
    with run.ledger.phase("score"):
        return run.world.gather(
            score(
                run.prompts,
                problems,
                replies,
                overlong_buffer=algorithm.overlong_buffer,
                greedy=algorithm.needs_greedy,
                grader=run.grading,
                shelf=run.shelf,
            )
        )
