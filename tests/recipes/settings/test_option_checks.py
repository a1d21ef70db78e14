"""Numbers that no run can work with are refused, each by its option's name."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from engine.errors import InvalidRequest, ModelNotFound
from recipes.settings.checks import (
    ABOVE_ZERO,
    BELOW_ONE,
    FROM_ZERO_TO_ONE,
    LEAST,
    UP_TO_ONE,
    check_options,
    check_sft,
)
from recipes.settings.command_line import with_values
from recipes.settings.options import PpoOptions, RunOptions, flatten
from recipes.settings.sft_options import SftOptions

BAD: list[tuple[str, Any, str]] = [
    *((name, least - 1, f"at least {least}") for name, least in LEAST.items()),
    *((name, 0.0, "above 0") for name in sorted(ABOVE_ZERO)),
    *((name, 1.0, r"in \[0, 1\)") for name in sorted(BELOW_ONE)),
    *((name, value, r"in \(0, 1\]") for name in sorted(UP_TO_ONE) for value in (0.0, 1.5)),
    *((name, value, r"in \[0, 1\]") for name in sorted(FROM_ZERO_TO_ONE) for value in (-0.1, 1.5)),
    ("lr", float("inf"), "above 0"),
    ("beta1", float("nan"), r"in \[0, 1\)"),
    ("kl_coef", float("nan"), "at least 0"),
]


@pytest.mark.parametrize("name,value,what", BAD)
def test_a_number_out_of_its_range_is_refused_by_name(name: str, value: Any, what: str) -> None:
    kinds = (RunOptions, PpoOptions, SftOptions)
    options = next(kind(model=__file__) for kind in kinds if name in flatten(kind()))
    given = int(value) if type(flatten(options)[name]) is int else value
    with pytest.raises(InvalidRequest, match=f"^{name} must be {what}, not ") as caught:
        if isinstance(options, SftOptions):
            check_sft(with_values(options, {name: given}))
        else:
            check_options(with_values(options, {name: given}))
    assert caught.value.field == name


@pytest.mark.parametrize("kind", [RunOptions, PpoOptions])
def test_the_defaults_are_in_their_ranges(kind: type[RunOptions]) -> None:
    check_options(kind(model=__file__))


CRITICS: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "grpo"}, "algorithm"),
    ({"critic_model": __file__}, "critic_model"),
    ({"critic": "own", "critic_model": "no/such/model"}, "critic_model"),
    ({"num_minibatches": 65}, "num_minibatches"),
    ({"dynamic_sampling": True}, "dynamic_sampling"),
]


@pytest.mark.parametrize("values,field", CRITICS)
def test_what_ppo_cannot_do_is_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises((InvalidRequest, ModelNotFound), match=f"^{field}") as caught:
        check_options(with_values(PpoOptions(model=__file__), values))
    assert caught.value.field == field


def test_the_loop_without_a_critic_does_not_run_ppo() -> None:
    with pytest.raises(InvalidRequest, match=r"ppo is of recipes/ppo\.py"):
        check_options(with_values(RunOptions(model=__file__), {"algorithm": "ppo"}))


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "grpo", "samples": 1}, "samples"),
    ({"algorithm": "reinforce++-baseline", "samples": 1}, "samples"),
    ({"algorithm": "reinforce++", "dynamic_sampling": True}, "dynamic_sampling"),
    ({"kl_controller": "adaptive"}, "kl_controller"),
    ({"num_minibatches": 9}, "num_minibatches"),
]


@pytest.mark.parametrize("values,field", IMPOSSIBLE)
def test_what_an_algorithm_cannot_do_is_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}") as caught:
        check_options(with_values(RunOptions(model=__file__), values))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "values",
    [
        {"algorithm": "reinforce++", "samples": 1},
        {"algorithm": "remax", "samples": 1, "dynamic_sampling": True},
        {"kl_controller": "adaptive", "kl_coef": 0.1},
    ],
)
def test_what_an_algorithm_can_do_is_let_through(values: dict[str, Any]) -> None:
    check_options(with_values(RunOptions(model=__file__), values))


IDLE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"judge_model": "m"}, {"reward": ("judge:http://h:1",)}),
    ({"judge_votes": 3}, {"reward": ("judge:http://h:1",)}),
    ({"judge_schema": True}, {"reward": ("judge:http://h:1",)}),
    ({"judge_labels": ("yes", "no")}, {"reward": ("judge:http://h:1",)}),
    ({"reward_label": 1}, {"reward": ("classify:http://h:1",)}),
    ({"reward_gpu": 1}, {"reward": (f"model:{__file__}",)}),
    ({"reward_memory_gb": 2.0}, {"reward": (f"model:{__file__}",)}),
    ({"reward_tokenizer": "f"}, {"reward": ("classify:http://h:1",)}),
    ({"reward_timeout": 1.0}, {"reward": ("http://h:1",)}),
    ({"sandbox": "best-effort"}, {"task": "expression"}),
    ({"code_seconds": 2}, {"reward": ("code",)}),
    ({"code_memory_gb": 2.0}, {"eval_set": ("a=expression",)}),
    ({"eval_temperature": 0.5}, {"eval_samples": 2}),
    ({"draft_tokens": 5}, {"speculative": "ngram"}),
    ({"teacher_kv_memory_gb": 2.0}, {"algorithm": "opd", "teacher": __file__}),
    ({"kl_in": "reward"}, {"kl_coef": 0.1}),
    ({"kl_estimator": "k2"}, {"kl_coef": 0.1}),
    ({"reference": "host"}, {"kl_coef": 0.1}),
    ({"kl_target": 1.0}, {"kl_coef": 0.1, "kl_controller": "adaptive"}),
    ({"is_mode": "mask"}, {"is_level": "token"}),
    ({"is_cap": 3.0}, {"is_level": "token"}),
    ({"is_floor": 0.5}, {"is_level": "token", "is_mode": "zero"}),
]


@pytest.mark.parametrize("given,needed", IDLE)
def test_what_would_be_ignored_is_refused_by_name(
    given: dict[str, Any], needed: dict[str, Any]
) -> None:
    options = RunOptions(model=__file__)
    (name,) = given
    with pytest.raises(InvalidRequest, match=rf"^{name}: .* says nothing here, ") as caught:
        check_options(with_values(options, given))
    assert caught.value.field == name
    check_options(with_values(options, {**given, **needed}))


@pytest.mark.parametrize(
    "values,field",
    [
        ({"kl_coef": 0.1, "kl_target": 1.0}, "kl_target"),
        ({"algorithm": "grpo", "max_resamples": 1}, "max_resamples"),
        ({"algorithm": "opd", "teacher": __file__, "gamma": 0.9}, "gamma"),
        ({"trainer_memory_gb": 1.0, "rollout_gpus": 1}, "trainer_memory_gb"),
        ({"rendezvous_host": "10.0.0.1"}, "rendezvous_host"),
        ({"rollout_gpus": 2, "rollout_tp": 2}, "rollout_tp"),
        ({"endpoint": ("http://a:1",), "speculative": "ngram"}, "speculative"),
        ({"reward": (f"model:{__file__}",), "reward_gpu": 1, "device": "cpu"}, "reward_gpu"),
    ],
)
def test_what_others_switch_off_is_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field}: .* says nothing here, "):
        check_options(with_values(RunOptions(model=__file__), values))


@pytest.mark.parametrize(
    "values,field",
    [
        ({"endpoint": ("a:1",)}, "endpoint"),
        ({"endpoint": ("http://a:1", "http://a:1/")}, "endpoint"),
        ({"endpoint": ("http://a:1",), "rollout_gpus": 1}, "rollout_gpus"),
    ],
)
def test_endpoints_are_urls_and_alone(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field}: ") as caught:
        check_options(with_values(RunOptions(model=__file__), values))
    assert caught.value.field == field


def test_the_weight_of_a_value_loss_that_stands_alone_is_refused_by_name() -> None:
    options = with_values(PpoOptions(model=__file__), {"value_coef": 0.5})
    check_options(options)
    with pytest.raises(InvalidRequest, match=r"^value_coef: "):
        check_options(with_values(options, {"critic": "own"}))


@pytest.mark.parametrize(
    "values,field",
    [
        ({"trainer_memory_gb": 1.0, "rollout_gpus": 1}, "trainer_memory_gb"),
        ({"task": "chats.jsonl", "max_new_tokens": 8}, "max_new_tokens"),
    ],
)
def test_what_a_supervised_run_would_ignore_is_refused_by_name(
    values: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field}: .* says nothing here, ") as caught:
        check_sft(with_values(SftOptions(model=__file__), values))
    assert caught.value.field == field


@pytest.mark.parametrize("task", [{"task": "chats.jsonl", "eval_task": "addition"}, {}])
def test_the_longest_answer_is_one_to_a_task(task: dict[str, Any]) -> None:
    check_sft(with_values(SftOptions(model=__file__), {"max_new_tokens": 8, **task}))


@pytest.mark.parametrize("num_gpus", [0, 3])
def test_a_cluster_is_asked_for_whole_engines(
    num_gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.settings.checks.find_spec", lambda name: name)
    values = {"launch": "ray", "rollout_gpus": num_gpus, "rollout_tp": 2}
    with pytest.raises(InvalidRequest, match=r"^rollout_gpus: .* engines of 2 GPUs") as caught:
        check_options(with_values(RunOptions(model=__file__), values))
    assert caught.value.field == "rollout_gpus"
    check_options(with_values(RunOptions(model=__file__), {**values, "rollout_gpus": 4}))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.settings.checks.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(InvalidRequest, match=r"pip install -e '\.\[ray\]'") as caught:
        check_options(with_values(RunOptions(model=__file__), {"launch": "ray", "rollout_gpus": 1}))
    assert caught.value.field == "launch"
