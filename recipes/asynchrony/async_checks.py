"""Combinations that asynchronous training cannot work with, refused before anything is loaded."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.errors import InvalidRequest
from recipes.settings.options import PpoOptions, RunOptions


def check_async(options: RunOptions) -> None:
    """Raises InvalidRequest naming the option."""
    given = options.asynchrony
    if not given.asynchronous:
        return
    if isinstance(options, PpoOptions):
        raise InvalidRequest(
            "async: a critic's advantages (GAE) are of the policy that sampled, and older replies "
            "would teach the one that learns by them; use recipes/grpo.py, or leave --async out",
            field="async",
        )
    _check_correction(options)
    _check_staleness(options)
    if options.routing.routing_replay and given.max_staleness:
        raise InvalidRequest(
            "routing_replay: routes of older weights are not those that the policy learns by; add "
            "--max-staleness 0, or leave --routing-replay out",
            field="routing_replay",
        )
    if options.endpoints.endpoint:
        raise InvalidRequest(
            "endpoint: servers elsewhere are asked for a step's replies at once; take engines of "
            "the run's own (--rollout-gpus), or leave --async out",
            field="endpoint",
        )
    if options.placement.sleep:
        raise InvalidRequest(
            "sleep: an engine that samples on cannot give its memory to the trainer; leave --sleep "
            "or --async out",
            field="sleep",
        )


def _check_correction(options: RunOptions) -> None:
    objective = options.objective
    if options.asynchrony.bypass:
        return
    if objective.algorithm == "dppo":
        raise InvalidRequest(
            "bypass: dppo compares with the policy that sampled in any case; leave --no-bypass out",
            field="bypass",
        )
    if objective.is_level == "none":
        raise InvalidRequest(
            "is_level: --no-bypass without importance weights takes the policy before the update "
            "for the one that sampled, so nothing says how old a token is; add --is-level token "
            "--is-mode zero --is-cap 5, or leave --no-bypass out",
            field="is_level",
        )


def _check_staleness(options: RunOptions) -> None:
    staleness = options.asynchrony.max_staleness
    if staleness >= max(options.steps, 1):
        raise InvalidRequest(
            f"max_staleness: no batch of a run of {options.steps} steps is {staleness} versions "
            "old; give less than --steps",
            field="max_staleness",
        )
    rollout, most = options.rollout, SchedulerConfig().max_waiting
    num = rollout.prompts_per_step * rollout.samples * (1 + staleness)
    if num > most:
        raise InvalidRequest(
            f"max_staleness: {num:,} replies under way at once (--prompts-per-step times --samples "
            f"times 1 + {staleness}) are more than the {most:,} that an engine keeps waiting",
            field="max_staleness",
        )
