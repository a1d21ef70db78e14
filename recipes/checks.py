"""Values no run can work with, refused before anything is loaded."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path

from engine.errors import InvalidRequest, ModelNotFound
from recipes.options import DEFAULT_MODEL, Options, PlacementOptions


def check_options(options: Options) -> None:
    """Raises InvalidRequest, its `field` an option's name; ModelNotFound for the model."""
    rollout, optimizer, algorithm = options.rollout, options.optimizer, options.objective
    _at_least("steps", options.steps, 0)
    _at_least("eval_every", options.eval_every, 0)
    _at_least("eval_prompts", options.eval_prompts, 1)
    _at_least("checkpoint_every", options.checkpoint_every, 0)
    _at_least("prompts_per_step", rollout.prompts_per_step, 1)
    _at_least("samples", rollout.samples, 2)
    _at_least("warmup_steps", optimizer.warmup_steps, 0)
    _at_least("max_tokens_per_microbatch", optimizer.max_tokens_per_microbatch, 1)
    _at_least("max_resamples", algorithm.max_resamples, 0)
    _at_least("num_iterations", algorithm.num_iterations, 1)
    _at_least("num_minibatches", algorithm.num_minibatches, 1)
    _positive("minutes", options.minutes)
    _positive("temperature", rollout.temperature)
    _positive("kv_memory_gb", rollout.kv_memory_gb)
    _positive("lr", optimizer.lr)
    _positive("max_grad_norm", optimizer.max_grad_norm)
    _at_least("is_cap", algorithm.is_cap, 1)
    _at_least("kl_coef", algorithm.kl_coef, 0)
    _at_least("weight_decay", optimizer.weight_decay, 0)
    _at_least("clip_low", algorithm.clip_low, 0)
    _at_least("clip_high", algorithm.clip_high, 0)
    _at_least("overlong_buffer", algorithm.overlong_buffer, 0)
    _at_least("max_new_tokens", rollout.max_new_tokens, 1)
    _check_placement(options.placement)
    _below_one("beta1", optimizer.beta1)
    _below_one("beta2", optimizer.beta2)
    if algorithm.num_minibatches > rollout.prompts_per_step:
        raise InvalidRequest(
            f"num_minibatches ({algorithm.num_minibatches}) is more than prompts_per_step "
            f"({rollout.prompts_per_step}): a minibatch holds at least one group",
            field="num_minibatches",
        )
    if options.wandb != "off":
        _check_extra("wandb", f"--wandb {options.wandb}", "wandb")
    if options.placement.trainer == "deepspeed":
        _check_extra("trainer", "--trainer deepspeed", "train")
    if options.resume is None and options.out is not None and holds_a_run(Path(options.out)):
        raise taken(Path(options.out))
    _check_model(options.model)


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
    _at_least("rollout_gpus", placement.rollout_gpus, 0)
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


def _check_model(model: str) -> None:
    if Path(model).exists():
        return
    hint = (
        "run `make setup` to get it"
        if model == str(DEFAULT_MODEL)
        else "give a Hugging Face folder, a .gguf file or a config.json of this machine; a name on "
        "a hub is not downloaded"
    )
    raise ModelNotFound(f"model: nothing at {model}; {hint}", field="model")


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not (math.isfinite(value) and value >= least):
        raise InvalidRequest(f"{name} must be at least {least}, not {value}", field=name)


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise InvalidRequest(f"{name} must be above 0, not {value}", field=name)


def _below_one(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InvalidRequest(f"{name} must be in [0, 1), not {value}", field=name)
