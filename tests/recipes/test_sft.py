"""Supervised runs: the loss falls, a resumed run is the unbroken one, GRPO goes on from the end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import InvalidRequest
from recipes import grpo
from recipes.data.chat_style import chat_style
from recipes.data.data_options import SftDataOptions
from recipes.run.ledger import Ledger
from recipes.settings.command_line import parse, parse_sft
from recipes.settings.options import RunOptions, flatten
from recipes.settings.sft_options import SftOptions, run_options
from recipes.sft import main, train
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.tuning.example_stream import DrawnExamples
from recipes.tuning.examples import ExampleWriter
from recipes.tuning.sft_opening import assemble_sft
from recipes.tuning.sft_run import SftRun
from recipes.tuning.sft_task import read_task
from tests.helpers.char_model import (
    CharAddition,
    char_model,
    char_tokenizer,
    write_char_model,
)
from tests.helpers.fake_actor import FakeActor

pytestmark = pytest.mark.usefixtures("no_plots")

FLAGS = """
batch_size beta1 beta2 chat_template_kwargs checkpoint_every completion_column config dashboard
device dither dtype epochs eval_every eval_prompts eval_task freeze_router gradient_checkpointing
heldout kv_memory_gb load_format lr max_grad_norm max_new_tokens max_tokens_per_microbatch minutes
model out prompt_column resume rollout_gpus router_aux_coef schedule seed skip_long_prompts sleep
steps system_prompt task train_on train_split trainer trainer_memory_gb wandb warmup_steps
weight_decay zero
"""


def sums_file(path: Path, num: int = 90) -> str:
    """Sums of two digits as prompts, completions and answers."""
    rows = [
        {"prompt": f"{10 + a}+{10 + (7 * a) % 90}=", "completion": f"{20 + a + (7 * a) % 90}"}
        for a in range(num)
    ]
    path.write_text("".join(json.dumps({**r, "answer": r["completion"]}) + "\n" for r in rows))
    return str(path)


def make_options(tmp_path: Path, **changes: Any) -> SftOptions:
    (tmp_path / "data").mkdir(parents=True, exist_ok=True)
    path = sums_file(tmp_path / "data" / "sums.jsonl")
    options = SftOptions(
        task=path,
        eval_task=path,
        out=str(tmp_path / "run"),
        batch_size=16,
        epochs=2.0,
        eval_every=4,
        eval_prompts=8,
        checkpoint_every=4,
        max_new_tokens=5,
        optimizer=OptimizerOptions(lr=1e-2, schedule="cosine", warmup_steps=2),
    )
    return dataclasses.replace(options, **changes)


def make_run(options: SftOptions) -> SftRun:
    model = char_model(16, 1)
    return assemble_sft(
        options,
        Ledger(),
        task=read_task(options, char_tokenizer(), 64),
        actor=FakeActor(model, [0]),
        tokenizer=char_tokenizer(),
        trainer=Trainer(
            model,
            options.optimizer,
            device=torch.device("cpu"),
            dtype=torch.float32,
            temperature=1.0,
        ),
    )


def go(options: SftOptions) -> tuple[SftRun, dict[str, Any]]:
    with make_run(options) as run:
        run.begin()
        train(run)
        summary = run.finish()
    return run, summary


def untimed(run: SftRun) -> list[dict[str, Any]]:
    rows = run.folder.read_metrics()
    return [{k: v for k, v in row.items() if not k.startswith("timing_s/")} for row in rows]


def test_the_flags_are_these() -> None:
    """A new option is a decision: write it here too."""
    assert sorted(flatten(SftOptions())) == FLAGS.split()


def test_help_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_sft(["--help"])
    told = capsys.readouterr().out
    assert all(f"--{flag.replace('_', '-')}" in told for flag in FLAGS.split())
    for flags, field in (
        (["--epochs", "1", "--steps", "2"], "epochs"),
        (["--batch-size", "0"], "batch_size"),
        (["--epochs", "0"], "epochs"),
    ):
        assert main([*flags, "--model", str(tmp_path)]) == 2
        assert f"InvalidRequest ({field})" in capsys.readouterr().err
    assert run_options(SftOptions(seed=5)).seed == 5


def test_a_run_of_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    for options, read, recipe in ((RunOptions(), parse_sft, "grpo"), (SftOptions(), parse, "sft")):
        (tmp_path / "config.json").write_text(json.dumps(flatten(options)))
        with pytest.raises(InvalidRequest, match=f"is a run of recipes/{recipe}.py") as caught:
            read(["--resume", str(tmp_path)])
        assert caught.value.field == "resume"


@pytest.mark.slow
def test_the_loss_falls_and_the_folder_is_complete(tmp_path: Path) -> None:
    run, summary = go(make_options(tmp_path, epochs=6.0))
    assert summary["eval_loss_after"] < 0.8 * summary["eval_loss_before"]
    assert summary["steps"] == run.total_steps == len(untimed(run))
    assert summary["examples"] == run.task.num
    last = untimed(run)[-1]
    assert last["perf/learnt_tokens"] > 0 and last["learning_rate"] < 2e-3
    assert {"eval/loss", "eval/accuracy"} <= untimed(run)[3].keys()
    for name in ("config.json", "metrics.jsonl", "summary.json", "loss.png", "model"):
        assert (run.folder.path / name).exists(), name


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken(tmp_path: Path) -> None:
    unbroken, expected = go(make_options(tmp_path / "a"))
    options = make_options(tmp_path / "b")
    options = dataclasses.replace(
        options, task=unbroken.options.task, eval_task=unbroken.options.task
    )
    with make_run(options) as killed, pytest.raises(KeyboardInterrupt):
        killed.begin()
        accumulate, steps = killed.trainer.accumulate, 0

        def dying(*args: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 7:
                raise KeyboardInterrupt
            return accumulate(*args)

        killed.trainer.accumulate = dying  # type: ignore[method-assign]
        train(killed)
    assert len(untimed(killed)) == 6
    resumed, summary = go(dataclasses.replace(options, resume=options.out))
    assert untimed(resumed) == untimed(unbroken)
    for key in ("steps", "eval_loss_before", "eval_loss_after", "eval_after"):
        assert summary[key] == expected[key]
    a, b = resumed.trainer.weights, unbroken.trainer.weights
    assert isinstance(a, torch.nn.Module) and isinstance(b, torch.nn.Module)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.slow
def test_a_made_task_is_learnt_from_its_answers(tmp_path: Path) -> None:
    options = make_options(tmp_path, steps=3, epochs=None, eval_every=0, minutes=10.0)
    run = make_run(options)
    writer = ExampleWriter(
        tokenizer=char_tokenizer(),
        style=chat_style(SftDataOptions(), char_tokenizer().chat_template),
    )
    drawn = DrawnExamples(CharAddition(), writer, 0)
    run.task = dataclasses.replace(run.task, examples=drawn, num=48, asked=None)
    with run:
        run.begin()
        train(run)
    assert len(untimed(run)) == 3


@pytest.mark.slow
def test_grpo_goes_on_from_a_tuned_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through both commands, with the real engine: a cold model learns to answer, and then more."""
    torch.set_num_threads(1)
    write_char_model(tmp_path / "cold", char_model(64, 2))
    path = sums_file(tmp_path / "sums.jsonl")
    words = ["--task", path, "--kv-memory-gb", "0.05", "--device", "cpu", "--eval-prompts", "16"]
    tuned = tmp_path / "tuned"
    sft = ["--model", str(tmp_path / "cold"), "--out", str(tuned), "--eval-task", path]
    sft += ["--lr", "3e-3", "--epochs", "12", "--eval-every", "0", "--max-new-tokens", "5"]
    assert main([*words, *sft]) == 0, capsys.readouterr().err
    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["eval_loss_after"] < 0.6 * summary["eval_loss_before"]
    again = ["--model", str(tuned / "model"), "--out", str(tmp_path / "rl"), "--steps", "2"]
    again += ["--prompts-per-step", "2", "--samples", "4", "--max-new-tokens", "5"]
    assert grpo.main([*words, *again]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "rl" / "summary.json").read_text())["steps"] == 2
