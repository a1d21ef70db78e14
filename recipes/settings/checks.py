"""Values no run can work with, refused before anything is loaded."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.config import MAX_DRAFT_TOKENS
from engine.errors import InvalidRequest, ModelNotFound
from engine.protocol.urls import url_fault
from recipes.algorithms.presets import AlgorithmOptions, resolve
from recipes.asynchrony.async_checks import check_async
from recipes.evaluation.evaluation_options import check_evaluation
from recipes.rewards.reward_options import check_reward_options
from recipes.settings.idle import check_idle, check_idle_sft
from recipes.settings.options import (
    DEFAULT_MODEL,
    PlacementOptions,
    PpoOptions,
    RolloutOptions,
    RunOptions,
    flatten,
)
from recipes.settings.sft_options import SftOptions

LEAST: Mapping[str, int] = MappingProxyType(
    {
        "steps": 0,
        "eval_every": 0,
        "eval_prompts": 1,
        "eval_samples": 0,
        "checkpoint_every": 0,
        "keep_rollouts": 0,
        "prompts_per_step": 1,
        "samples": 1,
        "max_new_tokens": 1,
        "rollout_gpus": 0,
        "rollout_tp": 1,
        "warmup_steps": 0,
        "weight_decay": 0,
        "max_tokens_per_microbatch": 1,
        "max_resamples": 0,
        "num_iterations": 1,
        "num_minibatches": 1,
        "clip_low": 0,
        "clip_high": 0,
        "overlong_buffer": 0,
        "kl_coef": 0,
        "is_cap": 1,
        "is_floor": 0,
        "max_staleness": 0,
        "engine_steps": 0,
        "critic_warmup_steps": 0,
        "value_coef": 0,
        "batch_size": 1,
        "code_seconds": 1,
        "judge_votes": 1,
        "reward_label": 0,
        "reward_gpu": 0,
        "router_aux_coef": 0,
    }
)
"""Least values of the numbers among the options."""

ABOVE_ZERO = frozenset(
    {
        *("minutes", "epochs", "temperature", "kv_memory_gb", "lr", "max_grad_norm"),
        *("reward_timeout", "reward_memory_gb", "code_memory_gb"),
        *("eval_temperature", "teacher_kv_memory_gb"),
        "endpoint_patience",
        *("kl_target", "kl_horizon", "critic_lr", "value_clip", "is_max_k3"),
    }
)
SHARES = frozenset({"max_failed_share"})
BELOW_ONE = frozenset({"beta1", "beta2"})
UP_TO_ONE = frozenset({"gamma"})
FROM_ZERO_TO_ONE = frozenset({"gae_lambda"})
DRAFTS = frozenset({"draft_tokens"})


def check_options(options: RunOptions) -> None:
    """Raises InvalidRequest, its `field` an option's name; ModelNotFound for the model."""
    check_numbers(flatten(options))
    _check_critic(options)
    _check_objective(options.objective, options.rollout)
    _check_teacher(options)
    check_evaluation(options.evaluation)
    check_reward_options(options.rewards)
    _check_endpoints(options)
    check_idle(options)
    check_async(options)
    _check_common(options)


def check_sft(options: SftOptions) -> None:
    """As `check_options`, of a supervised run. Raises InvalidRequest naming the option."""
    check_numbers(flatten(options))
    if options.steps is not None and options.epochs is not None:
        raise InvalidRequest(
            "epochs: --epochs and --steps both say how long the run is; leave one out",
            field="epochs",
        )
    check_idle_sft(options)
    _check_common(options)


def _check_common(options: RunOptions | SftOptions) -> None:
    _check_dashboard(options.dashboard)
    _check_placement(options.placement)
    if options.wandb != "off":
        _check_extra("wandb", f"--wandb {options.wandb}", "wandb")
    if options.placement.trainer == "deepspeed":
        _check_extra("trainer", "--trainer deepspeed", "train")
    if options.resume is None and options.out is not None and holds_a_run(Path(options.out)):
        raise taken(Path(options.out))
    check_model(options.model)


def _check_dashboard(given: str) -> None:
    is_port = given.isascii() and given.isdigit() and len(given) < 6 and int(given) < 1 << 16
    if not (is_port or given in ("auto", "on", "off")):
        raise InvalidRequest(
            f"dashboard: {given!r} is neither a port below 65536 nor 'on', 'off' or 'auto'",
            field="dashboard",
        )


def _check_objective(options: AlgorithmOptions, rollout: RolloutOptions) -> None:
    if options.num_minibatches > rollout.prompts_per_step:
        raise InvalidRequest(
            f"num_minibatches ({options.num_minibatches}) is more than prompts_per_step "
            f"({rollout.prompts_per_step}): a minibatch holds at least one group",
            field="num_minibatches",
        )
    algorithm, name = resolve(options, rollout.max_new_tokens or 1), options.algorithm
    if algorithm.compares_group and rollout.samples < 2:
        raise InvalidRequest(
            f"samples: {name} compares the samples of a problem, which takes at least 2, not "
            f"{rollout.samples}; give more, or another --algorithm, as reinforce++",
            field="samples",
        )
    if algorithm.dynamic_sampling and not algorithm.compares_problem:
        raise InvalidRequest(
            f"dynamic_sampling: {name} does not compare the replies to a problem, so equal ones "
            "are no reason to replace them; leave it out",
            field="dynamic_sampling",
        )
    if algorithm.policy_loss == "dppo" and options.is_level != "none":
        raise InvalidRequest(
            f"is_level: {name} weights every token by the ratio to the policy that sampled it "
            "already; leave --is-level out",
            field="is_level",
        )
    if algorithm.kl_controller == "adaptive" and algorithm.kl_coef == 0:
        raise InvalidRequest(
            "kl_controller: adaptive changes a weight that is above 0; add --kl-coef, 0.1 for "
            "example, or leave --kl-controller out",
            field="kl_controller",
        )


def _check_endpoints(options: RunOptions) -> None:
    """Endpoints are URLs, of different servers, and the only ones that roll out."""
    endpoint, num_gpus = options.endpoints.endpoint, options.placement.rollout_gpus
    for url in endpoint:
        if fault := url_fault(url):
            raise InvalidRequest(f"endpoint: {fault}", field="endpoint")
    if len({url.rstrip("/") for url in endpoint}) < len(endpoint):
        raise InvalidRequest("endpoint: a URL is given twice; leave one out", field="endpoint")
    if endpoint and num_gpus:
        raise InvalidRequest(
            f"rollout_gpus: {num_gpus} engines of the run's own beside those of --endpoint; leave "
            "one of the two out",
            field="rollout_gpus",
        )
    _check_ray(options)


def _check_ray(options: RunOptions) -> None:
    """A cluster is told how many engines there are, of as many GPUs each."""
    num_gpus, tp = options.placement.rollout_gpus, options.endpoints.rollout_tp
    if options.endpoints.launch != "ray":
        return
    _check_extra("launch", "--launch ray", "ray")
    if num_gpus == 0 or num_gpus % tp:
        raise InvalidRequest(
            f"rollout_gpus: --launch ray places engines of {tp} GPUs (--rollout-tp) each, and "
            f"{num_gpus} are asked for; give a multiple of {tp} above 0",
            field="rollout_gpus",
        )


def _check_teacher(options: RunOptions) -> None:
    """A teacher is there for the algorithm that learns from one, which learns from nothing else."""
    objective, teacher = options.objective, options.distillation.teacher
    distils = resolve(objective, 1).distils
    if distils and teacher is None:
        raise InvalidRequest(
            f"teacher: --algorithm {objective.algorithm} learns from one; add --teacher PATH",
            field="teacher",
        )
    if teacher is not None and not distils:
        raise InvalidRequest(
            f"teacher: --algorithm {objective.algorithm} learns from rewards; leave --teacher out, "
            "or add --algorithm opd",
            field="teacher",
        )
    for name, given in (
        ("kl_in", objective.kl_in == "reward"),
        ("normalise_rewards", objective.normalise_rewards),
    ):
        if distils and given:
            raise InvalidRequest(
                f"{name}: --algorithm {objective.algorithm} learns from no reward; leave it out",
                field=name,
            )


def _check_critic(options: RunOptions) -> None:
    """PPO's, and that it is PPO where there is one."""
    has_critic, name = isinstance(options, PpoOptions), options.objective.algorithm
    if has_critic != (name == "ppo"):
        recipe = "grpo.py" if has_critic else "ppo.py"
        raise InvalidRequest(
            f"algorithm: {name} is of recipes/{recipe}; use that, or leave --algorithm out",
            field="algorithm",
        )
    if not isinstance(options, PpoOptions):
        return
    given = options.value_function
    if given.critic_model is None:
        return
    if given.critic != "own":
        raise InvalidRequest(
            "critic_model: a critic on the policy's network starts from the policy; add "
            "--critic own, or leave --critic-model out",
            field="critic_model",
        )
    if not Path(given.critic_model).exists():
        raise ModelNotFound(
            f"critic_model: nothing at {given.critic_model}; give a Hugging Face folder or a .gguf "
            "file of this machine",
            field="critic_model",
        )


def holds_a_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / "config.json").exists()


def taken(path: Path) -> InvalidRequest:
    """The error for a new run in the folder of another."""
    return InvalidRequest(
        f"out: {path} already holds a run; continue it with --resume {path}, or give another --out",
        field="out",
    )


def in_use(path: Path) -> InvalidRequest:
    """The error for a run in a folder that a running one writes to."""
    return InvalidRequest(
        f"out: another run is writing to {path}; wait for it or end it, or give another --out",
        field="out",
    )


def _check_extra(field: str, flag: str, extra: str) -> None:
    package = {"train": "deepspeed"}.get(extra, extra)
    if package not in sys.modules and find_spec(package) is None:
        raise InvalidRequest(
            f"{field}: {flag} needs the {package} package: pip install -e '.[{extra}]'",
            field=field,
        )


def _check_placement(placement: PlacementOptions) -> None:
    if placement.zero is not None and placement.trainer != "deepspeed":
        raise InvalidRequest(
            f"zero: stage {placement.zero} is one of --trainer deepspeed, not of "
            f"{placement.trainer}; add --trainer deepspeed, or leave --zero out",
            field="zero",
        )
    if placement.sleep and placement.rollout_gpus:
        raise InvalidRequest(
            "sleep: engines on GPUs of their own (--rollout-gpus) share no memory with the "
            "trainer; leave one of the two out",
            field="sleep",
        )


def check_model(model: str) -> None:
    """Raises ModelNotFound (`model`) where nothing is at that path."""
    if Path(model).exists():
        return
    hint = (
        "run `make setup` to get it"
        if model == str(DEFAULT_MODEL)
        else "give a Hugging Face folder, a .gguf file or a config.json of this machine; a name on "
        "a hub is not downloaded"
    )
    raise ModelNotFound(f"model: nothing at {model}; {hint}", field="model")


def check_numbers(flat: Mapping[str, Any]) -> None:
    """None is a number that was not given."""
    numbers = {name: value for name, value in flat.items() if value is not None}
    for name, value in numbers.items():
        if name in LEAST:
            _require(name, value, value >= LEAST[name], f"at least {LEAST[name]}")
        elif name in ABOVE_ZERO:
            _require(name, value, value > 0, "above 0")
        elif name in SHARES:
            _require(name, value, 0 <= value <= 1, "in [0, 1]")
        elif name in BELOW_ONE:
            _require(name, value, 0 <= value < 1, "in [0, 1)")
        elif name in UP_TO_ONE:
            _require(name, value, 0 < value <= 1, "in (0, 1]")
        elif name in FROM_ZERO_TO_ONE:
            _require(name, value, 0 <= value <= 1, "in [0, 1]")
        elif name in DRAFTS:
            holds = 1 <= value <= MAX_DRAFT_TOKENS
            _require(name, value, holds, f"from 1 to {MAX_DRAFT_TOKENS}")


def _require(name: str, value: float, holds: bool, what: str) -> None:
    if not (holds and math.isfinite(value)):
        raise InvalidRequest(f"{name} must be {what}, not {value}", field=name)
