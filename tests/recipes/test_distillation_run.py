"""A student comes near to its teacher, whatever the rewards; a wrong teacher is named."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError, ContextTooLong, InvalidRequest, ModelNotFound
from recipes.actors.scorer import ScoringEngine, scoring_config
from recipes.actors.teacher import check_teacher, launch_teacher
from recipes.actors.teacher_options import TeacherOptions
from recipes.algorithms.presets import AlgorithmOptions
from recipes.grpo import train
from recipes.run.ledger import Ledger
from recipes.run.opening import assemble
from recipes.settings.options import RolloutOptions, RunOptions
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.types import Problem
from tests.helpers.char_model import CharAddition, char_model, char_tokenizer, write_char_model
from tests.helpers.engines import make_replica
from tests.helpers.fake_actor import FakeActor
from tests.helpers.tiny_models import write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]


class Silent(CharAddition):
    """A task that rewards nothing: only the teacher says what to do."""

    def verify(self, reply: str, problem: Problem) -> float:
        return 0.0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is sure of its tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    model = char_model(16, 1, seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    write_char_model(folder, model)
    return folder


def make_options(teacher: Path, **changes: Any) -> RunOptions:
    options = RunOptions(
        model=str(teacher),
        device="cpu",
        dtype="float32",
        steps=30,
        eval_every=0,
        eval_prompts=1,
        checkpoint_every=0,
        rollout=RolloutOptions(prompts_per_step=4, samples=4, max_new_tokens=3),
        optimizer=OptimizerOptions(lr=2e-2),
        objective=AlgorithmOptions(algorithm="opd"),
        distillation=TeacherOptions(teacher=str(teacher), teacher_kv_memory_gb=0.01),
    )
    return dataclasses.replace(options, **changes)


def test_a_student_comes_near_to_its_teacher_without_a_reward(
    teacher: Path, tmp_path: Path
) -> None:
    options = make_options(teacher, out=str(tmp_path / "run"))
    student = char_model(16, 1)
    run = assemble(
        options,
        Ledger(),
        environment=Silent(),
        actor=FakeActor(student, [0]),
        tokenizer=char_tokenizer(),
        trainer=Trainer(
            student,
            options.optimizer,
            device=torch.device("cpu"),
            dtype=torch.float32,
            temperature=1.0,
        ),
        teacher=ScoringEngine(
            scoring_config(options, str(teacher), kv_memory_gb=0.01),
            option="teacher",
            temperature=1.0,
            launch=lambda: make_replica(teacher),
        ),
    )
    with run:
        run.begin()
        train(run)
        run.finish()
    gaps = [row["teacher_kl"] for row in run.folder.read_metrics()]
    assert sum(gaps[-5:]) < 0.4 * sum(gaps[:5]), gaps
    assert all(row["reward"] == 0 for row in run.folder.read_metrics())


def test_a_teacher_that_does_not_fit_is_named_before_a_model_is_loaded(
    teacher: Path, tmp_path: Path
) -> None:
    tokenizer = char_tokenizer()
    check_teacher(make_options(teacher), tokenizer, longest=64)
    check_teacher(make_options(teacher, distillation=TeacherOptions()), tokenizer, longest=64)
    missing = make_options(teacher, distillation=TeacherOptions(teacher="no/such"))
    other = tmp_path / "other"
    other.mkdir()
    write_tiny(other, "llama")
    changed = char_tokenizer()
    changed._backend.add_tokens(["more"])
    changed.write_hf(other)
    for options, longest, kind in (
        (missing, 64, ModelNotFound),
        (make_options(teacher), 65, ContextTooLong),
        (make_options(other), 64, InvalidRequest),
    ):
        with pytest.raises(kind, match=r"^teacher: ") as caught:
            check_teacher(options, tokenizer, longest=longest)
        assert caught.value.field == "teacher"
    scores = tmp_path / "scores"
    shutil.copytree(teacher, scores)
    config = scores / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    with pytest.raises(CheckpointError, match=r"^teacher: .* scores sequences") as caught:
        check_teacher(make_options(scores), tokenizer, longest=64)
    assert caught.value.field == "teacher"


def test_a_teacher_with_fewer_logits_is_refused(teacher: Path) -> None:
    options = make_options(teacher)
    student = FakeActor(char_model(16, 1), [0]).state()
    engine = launch_teacher(options, student)
    assert engine is not None
    engine.close()
    assert launch_teacher(make_options(teacher, distillation=TeacherOptions()), student) is None
    wide = FakeActor(char_model(16, 1), [0])
    wide.model.config.vocab_size += 1
    with pytest.raises(InvalidRequest, match=r"teacher: .* has another vocabulary") as caught:
        launch_teacher(options, wide.state())
    assert caught.value.field == "teacher"
