"""Options that say nothing beside the others of a run are refused: who gives one expects it to do
something."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from engine.config import Device
from engine.errors import InvalidRequest
from recipes.algorithms.presets import resolve
from recipes.environments.named_tasks import is_file_task, runs_code
from recipes.evaluation.evaluation_options import EvaluationOptions, named_tasks
from recipes.rewards.reward_options import CLASSIFY, MODEL, GraderOptions, is_model_reward
from recipes.settings.options import PlacementOptions, PpoOptions, RunOptions, flatten
from recipes.settings.sft_options import SftOptions


class Measured(Protocol):
    """Options of a command whose replies are graded and evaluated: of a run, or of evaluate.py."""

    @property
    def device(self) -> Device:
        """Where everything computes."""

    @property
    def rewards(self) -> GraderOptions:
        """What grades."""

    @property
    def evaluation(self) -> EvaluationOptions:
        """What is evaluated, and how."""


class Placed(Protocol):
    """Options of a command that trains."""

    @property
    def placement(self) -> PlacementOptions:
        """Where trainer and engines are."""


Options = TypeVar("Options", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Theme(Generic[Options]):
    """Options that only mean something where `holds`. missing: what is not there, and what to
    add."""

    names: tuple[str, ...]
    holds: Callable[[Options], bool]
    missing: str


def check_idle(options: RunOptions) -> None:
    """Raises InvalidRequest naming an option that was given a value and would be ignored. A value
    that is the default is as none."""
    given = _given(options, type(options)())
    _refuse(options, given, GRADING)
    _refuse(options, given, TRAINING)
    _refuse(options, given, ROLLING_OUT)
    _refuse(options, given, PLACING)


def check_idle_sft(options: SftOptions) -> None:
    """As `check_idle`, of a supervised run."""
    given = _given(options, SftOptions())
    _refuse(options, given, TUNING)
    _refuse(options, given, PLACING)


def check_idle_evaluation(options: Measured, defaults: Measured) -> None:
    """As `check_idle`, of options that train nothing. defaults: what nobody gave."""
    given = _given(options, defaults)
    _refuse(options, given, EVALUATING)
    _refuse(options, given, GRADING)


def _refuse(options: Options, given: Collection[str], themes: Sequence[Theme[Options]]) -> None:
    for theme in themes:
        idle = [name for name in theme.names if name in given]
        if idle and not theme.holds(options):
            flag = f"--{idle[0].replace('_', '-')}"
            raise InvalidRequest(
                f"{idle[0]}: {flag} says nothing here, {theme.missing}, or leave it out",
                field=idle[0],
            )


def _given(options: Any, defaults: Any) -> list[str]:
    """Names of the options that differ from the defaults of their command."""
    before = flatten(defaults)
    return [name for name, value in flatten(options).items() if value != before[name]]


def _grades_files(options: Measured) -> bool:
    """Whether a set is a file; the others have their own reward, which `task` is another word
    for."""
    tasks = named_tasks(options.evaluation.eval_set).values()
    return options.rewards.reward == ("task",) or any(is_file_task(task) for task in tasks)


def _has_reward(*beginnings: str) -> Callable[[Measured], bool]:
    return lambda options: any(name.startswith(beginnings) for name in options.rewards.reward)


def _waits_for_reward(options: Measured) -> bool:
    """Whether a reward is a user's or a service's."""
    own = ("task", "code")
    return any(n not in own and not n.startswith(MODEL) for n in options.rewards.reward)


def _runs_programs(options: Measured) -> bool:
    tasks = list(named_tasks(options.evaluation.eval_set).values())
    if isinstance(options, RunOptions) and options.rewards.uses_task:
        tasks.append(options.task)
    return "code" in options.rewards.reward or any(runs_code(task) for task in tasks)


def _resamples(options: RunOptions) -> bool:
    return resolve(options.objective, 1).dynamic_sampling


def _learns_from_rewards(options: RunOptions) -> bool:
    return not resolve(options.objective, 1).distils


def _has_value_term(options: RunOptions) -> bool:
    return isinstance(options, PpoOptions) and options.value_function.critic == "shared"


EVALUATING: tuple[Theme[Measured], ...] = (
    Theme(
        names=("reward",),
        holds=_grades_files,
        missing="where every set has a reward of its own: evaluate on a file",
    ),
)
"""Of a command that trains nothing."""

GRADING: tuple[Theme[Measured], ...] = (
    Theme(
        names=("judge_model", "judge_prompt", "judge_votes", "judge_schema", "judge_labels"),
        holds=_has_reward("judge:"),
        missing="where no judge grades: add --reward judge:URL",
    ),
    Theme(
        names=("judge_votes", "judge_schema"),
        holds=lambda options: not options.rewards.judge_labels,
        missing="where labels are read and nothing is said: leave out --judge-labels",
    ),
    Theme(
        names=("reward_label",),
        holds=lambda options: any(is_model_reward(name) for name in options.rewards.reward),
        missing="where no reward model grades: add --reward model:FOLDER or classify:URL",
    ),
    Theme(
        names=("reward_gpu", "reward_memory_gb"),
        holds=_has_reward(MODEL),
        missing="where the run has no reward model of its own: add --reward model:FOLDER",
    ),
    Theme(
        names=("reward_gpu",),
        holds=lambda options: options.device != "cpu",
        missing="where nothing is on a GPU: change --device",
    ),
    Theme(
        names=("reward_tokenizer",),
        holds=_has_reward(CLASSIFY),
        missing="where no server's classifier grades: add --reward classify:URL",
    ),
    Theme(
        names=("reward_timeout",),
        holds=_waits_for_reward,
        missing="where neither a function of yours nor a service grades: add a --reward",
    ),
    Theme(
        names=("sandbox", "code_reward", "code_seconds", "code_memory_gb"),
        holds=_runs_programs,
        missing="where no program is run: add --reward code, or take a task of programs",
    ),
    Theme(
        names=("eval_temperature",),
        holds=lambda options: options.evaluation.eval_samples > 0,
        missing="where evaluation is greedy: add --eval-samples",
    ),
)
"""Of every command that grades replies."""

TRAINING: tuple[Theme[RunOptions], ...] = (
    Theme(
        names=("draft_tokens",),
        holds=lambda options: options.rollout.speculative != "off",
        missing="where nothing is drafted: add --speculative",
    ),
    Theme(
        names=("teacher_kv_memory_gb",),
        holds=lambda options: options.distillation.teacher is not None,
        missing="where there is no teacher: add --algorithm opd --teacher PATH",
    ),
    Theme(
        names=("value_coef",),
        holds=_has_value_term,
        missing="where the value loss stands alone: add --critic shared",
    ),
    Theme(
        names=("kl_in", "kl_estimator", "reference", "kl_target", "kl_horizon"),
        holds=lambda options: options.objective.kl_coef > 0,
        missing="where there is no KL: add --kl-coef",
    ),
    Theme(
        names=("kl_target", "kl_horizon"),
        holds=lambda options: options.objective.kl_controller == "adaptive",
        missing="where the weight of the KL is fixed: add --kl-controller adaptive",
    ),
    Theme(
        names=("is_mode", "is_cap", "is_floor"),
        holds=lambda options: options.objective.is_level != "none",
        missing="where nothing is weighted: add --is-level",
    ),
    Theme(
        names=("is_floor",),
        holds=lambda options: options.objective.is_mode != "truncate",
        missing="where weights are cut from above alone: add --is-mode mask or zero",
    ),
    Theme(
        names=("max_resamples",),
        holds=_resamples,
        missing="where groups are not replaced: add --dynamic-sampling True",
    ),
    Theme(
        names=("max_staleness", "strict_age", "bypass", "stale_kv", "engine_steps"),
        holds=lambda options: options.asynchrony.asynchronous,
        missing="where a step waits for its own rollouts: add --async",
    ),
    Theme(
        names=("strict_age", "stale_kv", "engine_steps"),
        holds=lambda options: options.asynchrony.max_staleness > 0,
        missing="where nothing is sampled ahead: raise --max-staleness",
    ),
    Theme(
        names=("engine_steps",),
        holds=lambda options: options.placement.rollout_gpus == 0,
        missing="where engines have processes of their own: leave --rollout-gpus out",
    ),
    Theme(
        names=("overlong_buffer", "gamma"),
        holds=_learns_from_rewards,
        missing="where a teacher is learned from, not rewards: take another --algorithm",
    ),
)
"""Of a run that learns from what it samples."""

ROLLING_OUT: tuple[Theme[RunOptions], ...] = (
    Theme(
        names=("endpoint_patience", "rendezvous_host"),
        holds=lambda options: bool(options.endpoints.endpoint) or options.endpoints.launch == "ray",
        missing="where the run's engines are here: add --endpoint URL",
    ),
    Theme(
        names=("rollout_tp",),
        holds=lambda options: options.endpoints.launch == "ray",
        missing="where engines have a GPU each: add --launch ray",
    ),
    Theme(
        names=("speculative", "rollout_quantization", "sleep", "trainer_memory_gb"),
        holds=lambda options: not options.endpoints.endpoint,
        missing="where others' engines roll out: give it to the servers of --endpoint",
    ),
)
"""Of a run with rollouts."""

TUNING: tuple[Theme[SftOptions], ...] = (
    Theme(
        names=("max_new_tokens",),
        holds=lambda options: options.eval_task is not None or not is_file_task(options.task),
        missing="where no problem is answered: add --eval-task",
    ),
)
"""Of a supervised run."""

PLACING: tuple[Theme[Placed], ...] = (
    Theme(
        names=("trainer_memory_gb",),
        holds=lambda options: options.placement.rollout_gpus == 0,
        missing="where engines have GPUs of their own: leave --rollout-gpus out",
    ),
)
"""Of every run."""
