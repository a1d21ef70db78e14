"""Measures the weights that an engine serves, on every set of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.errors import GradingFailed
from engine.protocol import SamplingParams
from recipes.actors.actor import Actor
from recipes.collecting.collect import rollout, score
from recipes.collecting.prompts import Prompts, PromptTokenizer
from recipes.data.chat_style import ChatStyle
from recipes.evaluation.estimates import Outcome, summarise
from recipes.evaluation.eval_sets import EvalSet
from recipes.evaluation.evaluation_options import MAIN_SET, EvaluationOptions
from recipes.rewards.grading import Grading
from recipes.rewards.programs.code_options import CodeOptions
from recipes.rewards.task_reward import task_reward
from recipes.types import Problem, Trajectory
from recipes.world import World
from rollout.offline import derive_seed


class Evaluation:
    """The sets of a run, or of `recipes/evaluate.py`, and how replies to them are sampled.

    Training goes on as if no evaluation had been: no cached prefix is left behind, and the seeds
    are those of the set and the problem alone, the same at every step of every run.
    """

    def __init__(
        self,
        sets: Sequence[EvalSet],
        options: EvaluationOptions,
        *,
        tokenizer: PromptTokenizer,
        eos_ids: Sequence[int],
        max_new_tokens: int | None = None,
        style: ChatStyle | None = None,
        gradings: Mapping[str, Grading] | None = None,
        code: CodeOptions | None = None,
        world: World | None = None,
    ) -> None:
        """max_new_tokens: longest reply; None takes each task's own. style: of all prompts.
        gradings: graders that others own, by the name of their set; the rest have one here.
        code: how these run programs."""
        self.sets = tuple(sets)
        self._options = options
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._max_new_tokens = max_new_tokens
        self._style = style
        self._gradings = dict(gradings or {})
        self._code = code
        self._world = world or World()

    @property
    def rewarded(self) -> frozenset[str]:
        """Names of the sets whose accuracy is a mean reward, no share of right answers."""
        return frozenset(n for n, given in self._gradings.items() if not given.measures_accuracy)

    def measure(self, actor: Actor) -> dict[str, float]:
        """Collective: `eval/<set>/<figure>` of every set, see `estimates.summarise`; and
        `eval/accuracy`, that of the task's own held-out problems, where they are a set.

        Raises GradingFailed if no greedy reply to a set could be graded.
        """
        figures: dict[str, float] = {}
        for each in self.sets:
            outcomes = self._outcomes(actor, each)
            found = summarise(outcomes, num_samples=self._options.eval_samples, ks=self._options.ks)
            if "accuracy" not in found:
                told = next((o.failure for o in outcomes if o.failure), "no reply")
                raise GradingFailed(
                    f"reward: of the {len(each.problems)} greedy replies to {each.name} none "
                    f"could be graded ({told}); mend its reward",
                    field="reward",
                )
            figures.update((f"eval/{each.name}/{name}", value) for name, value in found.items())
        if f"eval/{MAIN_SET}/accuracy" in figures:
            figures["eval/accuracy"] = figures[f"eval/{MAIN_SET}/accuracy"]
        return figures

    def _outcomes(self, actor: Actor, eval_set: EvalSet) -> list[Outcome]:
        """Of each problem of a set, by all processes."""
        options, world = self._options, self._world
        share = world.share(len(eval_set.problems))
        problems = eval_set.problems[share.start : share.stop]
        prompts = Prompts(eval_set.environment, self._tokenizer, self._eos_ids, self._style)
        kept = self._gradings.get(eval_set.name)
        grading = kept or Grading(task_reward(eval_set.environment, code=self._code))
        try:
            greedy = self._replies(actor, prompts, problems, grading, eval_set.name, share.start)
            sampled: list[list[Trajectory]] = [[] for _ in problems]
            if options.eval_samples:
                sampled = self._replies(
                    *(actor, prompts, problems, grading, eval_set.name, share.start),
                    samples=options.eval_samples,
                    temperature=options.eval_temperature,
                )
        finally:
            if kept is None:
                grading.close()
        mine = [_outcome(*pair) for pair in zip(greedy, sampled, strict=True)]
        return world.gather(mine)

    def _replies(
        self,
        actor: Actor,
        prompts: Prompts,
        problems: Sequence[Problem],
        grading: Grading,
        name: str,
        first: int,
        *,
        samples: int = 1,
        temperature: float = 0.0,
    ) -> list[list[Trajectory]]:
        """Graded replies to each problem."""
        longest = self._max_new_tokens or prompts.environment.max_new_tokens
        sampling = SamplingParams(max_new_tokens=longest, temperature=temperature)
        seed = derive_seed(0, "evaluation", name)
        replies = rollout(
            actor, prompts, problems, sampling, samples=samples, seed=seed, first=first
        )
        actor.flush()
        groups = score(prompts, problems, replies, grader=grading)
        return [list(group.trajectories) for group in groups]


def _outcome(greedy: Sequence[Trajectory], sampled: Sequence[Trajectory]) -> Outcome:
    return Outcome(
        greedy=None if greedy[0].failed else greedy[0].correct,
        samples=tuple(t.correct for t in sampled if not t.failed),
        num_failed=sum(bool(t.failed) for t in (*greedy, *sampled)),
        failure=next((t.failed for t in (*greedy, *sampled) if t.failed), ""),
    )
