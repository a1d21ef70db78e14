"""Flags, TOML and resumption; the set of flags is frozen."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from engine.errors import InvalidRequest, ModelNotFound
from recipes.settings import checks
from recipes.settings.command_line import NAMED_OTHERWISE, flatten, parse, recipe_of
from recipes.settings.options import DEFAULT_MODEL, PpoOptions, RunOptions

FLAGS = """
algorithm
answer_column
answer_pattern
asynchronous
beta1
beta2
bypass
chat_template_kwargs
checkpoint_every
clip_high
clip_low
code_memory_gb
code_reward
code_seconds
config
dashboard
device
dither
draft_tokens
dtype
dynamic_sampling
endpoint
endpoint_patience
engine_steps
eval_every
eval_k
eval_prompts
eval_samples
eval_set
eval_temperature
freeze_router
gamma
gradient_checkpointing
heldout
is_cap
is_floor
is_level
is_max_k3
is_mode
judge_labels
judge_model
judge_prompt
judge_schema
judge_votes
keep_entropy
keep_rollouts
kl_coef
kl_controller
kl_estimator
kl_horizon
kl_in
kl_target
kv_memory_gb
launch
load_format
loss_aggregation
lr
max_failed_share
max_grad_norm
max_new_tokens
max_resamples
max_staleness
max_tokens_per_microbatch
minutes
model
normalise_rewards
num_iterations
num_minibatches
out
overlong_buffer
prompt_column
prompts_per_step
reference
rendezvous_host
resume
reward
reward_gpu
reward_label
reward_memory_gb
reward_timeout
reward_tokenizer
rollout_gpus
rollout_quantization
rollout_tp
router_aux_coef
routing_replay
samples
sandbox
schedule
seed
skip_long_prompts
sleep
speculative
stale_kv
steps
strict_age
system_prompt
task
teacher
teacher_kv_memory_gb
temperature
train_split
trainer
trainer_memory_gb
wandb
warmup_steps
weight_decay
whiten_advantages
zero
"""


CRITIC_FLAGS = """
critic critic_lr critic_model critic_warmup_steps gae_lambda normalise_values value_clip value_coef
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model"
    path.mkdir()
    return str(path)


def test_the_flags_are_these() -> None:
    """A new option is a decision: write it here too."""
    assert sorted(flatten(RunOptions())) == FLAGS.split()


def test_ppo_has_the_flags_of_a_critic_too() -> None:
    assert sorted(flatten(PpoOptions())) == sorted([*FLAGS.split(), *CRITIC_FLAGS.split()])


@pytest.mark.parametrize("defaults", [RunOptions(), PpoOptions()])
def test_help_explains_every_flag(defaults: RunOptions, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], defaults)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert recipe_of(defaults) in text
    words = {option: word for word, option in NAMED_OTHERWISE.items()}
    for flag in (words.get(name, name) for name in flatten(defaults)):
        assert re.search(f"--{flag.replace('_', '-')}[ ,]", text), flag


def test_flags_override_toml_overrides_defaults(tmp_path: Path, model: str) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('task = "addition"\nlr = 3e-5\nalgorithm = "dapo"\nsteps = 7\nkl_coef = 1\n')
    options = parse(["--config", str(toml), "--model", model, "--steps", "9"])
    assert (options.task, options.steps, options.seed) == ("addition", 9, 0)
    assert options.optimizer.lr == 3e-5
    assert options.objective.algorithm == "dapo"
    assert options.objective.kl_coef == 1.0


@pytest.mark.parametrize(
    "line,field",
    [("stpes = 3", "stpes"), ("rollout = 3", "rollout"), ('lr = "fast"', "lr"), ("a b", "config")],
)
def test_a_bad_toml_names_the_key(tmp_path: Path, model: str, line: str, field: str) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(line + "\n")
    with pytest.raises(InvalidRequest) as caught:
        parse([f"--config={toml}", "--model", model])
    assert caught.value.field == field


def test_a_toml_of_other_editors(tmp_path: Path, model: str) -> None:
    toml = tmp_path / "run.toml"
    toml.write_bytes(b"\xef\xbb\xbfsteps = 3\r\n")
    assert parse([f"--config={toml}", "--model", model]).steps == 3
    toml.write_bytes("steps = 3".encode("utf-16"))
    with pytest.raises(InvalidRequest, match=r"run\.toml"):
        parse([f"--config={toml}", "--model", model])


@pytest.mark.parametrize(
    "flags,field",
    [
        (["--steps", "-1"], "steps"),
        (["--minutes", "0"], "minutes"),
        (["--samples", "1"], "samples"),
        (["--temperature", "0"], "temperature"),
        (["--lr", "nan"], "lr"),
        (["--beta2", "1"], "beta2"),
        (["--is-cap", "0.5"], "is_cap"),
        (["--clip-low", "-0.1"], "clip_low"),
        (["--num-minibatches", "9"], "num_minibatches"),
        (["--zero", "3"], "zero"),
        (["--zero", "1", "--trainer", "fsdp"], "zero"),
        (["--rollout-gpus", "-1"], "rollout_gpus"),
        (["--rollout-gpus", "1", "--sleep", "True"], "sleep"),
        (["--algorithm", "opd"], "teacher"),
        (["--algorithm", "grpo", "--teacher", "there"], "teacher"),
        (["--algorithm", "opd", "--teacher", "there", "--kl-in", "reward"], "kl_in"),
        (
            ["--algorithm", "opd", "--teacher", "there", "--normalise-rewards"],
            "normalise_rewards",
        ),
        (["--judge-votes", "2"], "judge_votes"),
        (["--reward", "judge:http://a:1", "--judge-labels", "yes"], "judge_labels"),
        (["--reward", "judge:http://a:1", "--judge-labels", "yes", "yes"], "judge_labels"),
        (["--reward", "classify:http://a:1", "--judge-model", "m"], "judge_model"),
        (["--reward-label", "1"], "reward_label"),
        (["--reward", "judge:http://a:1", "--reward-gpu", "0"], "reward_gpu"),
        (["--reference", "engine"], "reference"),
        (["--eval-k", "4"], "eval_k"),
        (["--eval-samples", "8", "--eval-k", "1,9"], "eval_k"),
        (["--eval-samples", "8", "--eval-k", "0"], "eval_k"),
        (["--eval-set", "sums"], "eval_set"),
        (["--eval-set", "=addition"], "eval_set"),
        (["--eval-set", "a/b=addition"], "eval_set"),
        (["--eval-set", "heldout=addition"], "eval_set"),
        (["--eval-set", "a=addition", "--eval-set", "a=largest"], "eval_set"),
    ],
)
def test_values_no_run_can_work_with(model: str, flags: list[str], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(["--model", model, *flags])
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    "package,flags,field",
    [
        ("wandb", ["--wandb", "offline"], "wandb"),
        ("deepspeed", ["--trainer", "deepspeed"], "trainer"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_loaded(
    package: str, flags: list[str], field: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=r"pip install -e '\.\[\w+\]'") as caught:
        parse(["--model", model, *flags])
    assert caught.value.field == field
    monkeypatch.setattr(checks, "find_spec", lambda name: name)
    assert parse(["--model", model, *flags])


def test_the_folder_of_a_run_is_no_place_for_another(tmp_path: Path, model: str) -> None:
    assert parse(["--model", model, "--out", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="--resume") as caught:
        parse(["--model", model, "--out", str(tmp_path)])
    assert caught.value.field == "out"


def test_a_missing_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match=r"nothing at no/such/model; .* not downloaded"):
        parse(["--model", "no/such/model"])
    if not DEFAULT_MODEL.exists():
        with pytest.raises(ModelNotFound, match="make setup"):
            parse([])


def saved_run(tmp_path: Path, *flags: str, defaults: RunOptions | None = None) -> str:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    run = tmp_path / "run"
    run.mkdir()
    options = parse(["--model", str(model), *flags], defaults)
    (run / "config.json").write_text(json.dumps(flatten(options)))
    return str(run)


def test_a_resumed_run_takes_its_own_options(tmp_path: Path) -> None:
    run = saved_run(tmp_path, "--lr", "1e-4", "--steps", "5", "--algorithm", "rloo")
    options = parse(["--resume", run, "--steps", "8"])
    assert options.optimizer.lr == 1e-4
    assert options.objective.algorithm == "rloo"
    assert (options.steps, options.resume) == (8, run)


@pytest.mark.parametrize("flags,field", [(["--lr", "1e-3"], "lr"), (["--seed", "2"], "seed")])
def test_a_resumed_run_refuses_to_become_another(
    tmp_path: Path, flags: list[str], field: str
) -> None:
    run = saved_run(tmp_path)
    with pytest.raises(InvalidRequest, match="run to resume") as caught:
        parse(["--resume", run, *flags])
    assert caught.value.field == field


def test_a_resumed_run_may_be_measured_otherwise(tmp_path: Path) -> None:
    run = saved_run(tmp_path, "--eval-set", "sums=addition")
    words = ["--eval-set", "sums=addition", "--eval-set", "big=largest", "--eval-samples", "8"]
    evaluation = parse(["--resume", run, *words, "--eval-k", "1,4"]).evaluation
    assert evaluation.eval_set == ("sums=addition", "big=largest")
    assert (evaluation.eval_samples, evaluation.ks) == (8, (1, 4))
    assert parse(["--resume", run]).evaluation.eval_set == ("sums=addition",)


def test_a_schedule_that_ends_fixes_the_steps(tmp_path: Path) -> None:
    run = saved_run(tmp_path, "--schedule", "linear", "--steps", "5")
    with pytest.raises(InvalidRequest) as caught:
        parse(["--resume", run, "--steps", "8"])
    assert caught.value.field == "steps"


def test_resuming_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="folder of a run"):
        parse(["--resume", str(tmp_path)])


def test_a_resumed_run_of_ppo_takes_its_own_options(tmp_path: Path, model: str) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text("gae_lambda = 0.9\nsamples = 2\nsteps = 5\n")
    flags = ["--config", str(toml), "--critic", "own", "--critic-model", model]
    run = saved_run(tmp_path, *flags, defaults=PpoOptions())
    options = parse(["--resume", run, "--steps", "8"], PpoOptions())
    assert isinstance(options, PpoOptions)
    assert options.value_function.critic_model == model
    assert (options.value_function.gae_lambda, options.rollout.samples) == (0.9, 2)
    assert options.steps == 8
    with pytest.raises(InvalidRequest, match="run to resume") as caught:
        parse(["--resume", run, "--value-clip", "0.3"], PpoOptions())
    assert caught.value.field == "value_clip"


@pytest.mark.parametrize("by_ppo", [False, True])
def test_a_run_is_resumed_by_its_own_recipe(tmp_path: Path, by_ppo: bool) -> None:
    kinds = (RunOptions(), PpoOptions()) if by_ppo else (PpoOptions(), RunOptions())
    run = saved_run(tmp_path, defaults=kinds[1])
    recipe = "recipes/ppo.py" if by_ppo else "recipes/grpo.py"
    with pytest.raises(InvalidRequest, match=f"is a run of {recipe}; continue it") as caught:
        parse(["--resume", run], kinds[0])
    assert caught.value.field == "resume"


def test_an_option_that_the_recipe_has_not_is_named(tmp_path: Path) -> None:
    run = Path(saved_run(tmp_path))
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**values, "no_longer": 1}))
    with pytest.raises(InvalidRequest, match=r"has no_longer, .* no option of recipes/grpo.py"):
        parse(["--resume", str(run)])


@pytest.mark.parametrize(
    "words",
    [
        ["--reward", "task", "json:loads", "--steps", "3"],
        ["--reward", "task", "--steps", "3", "--reward", "json:loads"],
        ["--reward=task", "--steps=3", "--reward=json:loads"],
    ],
)
def test_rewards_add_up_however_they_are_given(words: list[str]) -> None:
    options = parse(["--model", __file__, *words])
    assert options.rewards.reward == ("task", "json:loads") and options.steps == 3
