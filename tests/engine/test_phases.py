"""The peaks of the phases that an engine and a trainer on one GPU go through."""

from __future__ import annotations

import pytest

from engine.config import MemoryConfig
from engine.errors import OutOfMemory
from engine.memory import Needs
from engine.phases import TrainerNeeds, check_phases, plan_phases

GIB = 1 << 30
ENGINE = Needs(weights=15 * GIB, workspace=2 * GIB, graphs=GIB, shadow=15 * GIB)
TRAINER = TrainerNeeds(asleep=GIB, training=70 * GIB, publishing=20 * GIB)


def peaks(engine: Needs = ENGINE, trainer: TrainerNeeds = TRAINER, kv: int = 40) -> dict[str, int]:
    phases = plan_phases(
        engine, trainer, kv_bytes=kv * GIB, device_bytes=80 * GIB, residue_bytes=GIB
    )
    return {phase.name: phase.num_bytes // GIB for phase in phases}


def test_each_phase_holds_what_is_awake_in_it() -> None:
    assert peaks() == {
        "rollout": 1 + 15 + 40 + 1 + 2 + 1,
        "train": 1 + 70,
        "update": 1 + 15 + 15 + 20,
        "resume": 1 + 15 + 40 + 1 + 1,
    }


@pytest.mark.parametrize(
    "trainer, kv, name, arithmetic",
    [
        (TRAINER, 70, "rollout", r"KV 70\.00 GiB .* = 90\.00 GiB, 10\.00 GiB too much"),
        (TrainerNeeds(training=81 * GIB), 40, "train", r"trainer 81\.00 GiB = 82\.00 GiB"),
        (TrainerNeeds(publishing=50 * GIB), 40, "update", r"shadow 15\.00 GiB \+ trainer 50\.00"),
    ],
)
def test_a_phase_that_does_not_fit_is_refused_by_name(
    trainer: TrainerNeeds, kv: int, name: str, arithmetic: str
) -> None:
    with pytest.raises(OutOfMemory, match=arithmetic) as refusal:
        peaks(trainer=trainer, kv=kv)
    assert refusal.value.field == name
    assert f"{name}: " in refusal.value.message


def test_every_phase_that_does_not_fit_is_named() -> None:
    with pytest.raises(OutOfMemory) as refusal:
        peaks(trainer=TrainerNeeds(asleep=50 * GIB, training=90 * GIB))
    for name in ("rollout", "train", "resume"):
        assert f"{name}: " in refusal.value.message
    assert "update: " not in refusal.value.message


def test_a_trainer_of_which_nothing_is_said_plans_nothing() -> None:
    assert check_phases(MemoryConfig(saver=True), ENGINE, kv_bytes=1 << 50, device_bytes=1) == []


def test_the_configuration_says_what_the_trainer_needs(caplog: pytest.LogCaptureFixture) -> None:
    memory = MemoryConfig(
        trainer_bytes=2 * GIB, trainer_training_bytes=60 * GIB, trainer_publishing_bytes=5 * GIB
    )
    with caplog.at_level("INFO"):
        phases = check_phases(memory, ENGINE, kv_bytes=10 * GIB, device_bytes=80 * GIB)
    trainer = {phase.name: phase.parts["trainer"] // GIB for phase in phases}
    assert trainer == {"rollout": 2, "train": 60, "update": 5, "resume": 2}
    assert "train: engine residue" in caplog.text
    with pytest.raises(OutOfMemory, match="train: "):
        check_phases(memory, ENGINE, kv_bytes=10 * GIB, device_bytes=50 * GIB)
