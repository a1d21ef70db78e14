"""The peak of each phase that an engine and a trainer on one GPU go through, before any runs.

Two allocators that do not see each other share the device: what one keeps, the other lacks. A
phase is what both hold at its peak.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from engine.config import MemoryConfig
from engine.errors import OutOfMemory
from engine.memory import Needs, gib

logger = logging.getLogger(__name__)

RESIDUE_BYTES = 920 << 20
"""What an engine holds while it sleeps: the driver's context and small tables; 0.86 GiB were
measured on an H100 with the Qwen2.5-1.5B shape."""


@dataclass(frozen=True, kw_only=True)
class TrainerNeeds:
    """What a colocated trainer holds on one GPU, in bytes.

    asleep: while the engine rolls out (what it does not offload). training: at the peak of its
    step: weights, gradients, optimizer state, activations. publishing: while it sends weights,
    its buckets included.
    """

    asleep: int = 0
    training: int = 0
    publishing: int = 0


@dataclass(frozen=True)
class Phase:
    """One phase: what it holds, by name, in bytes."""

    name: str
    parts: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """The peak."""
        return sum(self.parts.values())

    def describe(self) -> str:
        """'train: residue 1.00 GiB + trainer 60.00 GiB = 61.00 GiB'."""
        terms = " + ".join(f"{name} {gib(size)}" for name, size in self.parts.items() if size)
        return f"{self.name}: {terms} = {gib(self.num_bytes)}"


def plan_phases(
    engine: Needs, trainer: TrainerNeeds, *, kv_bytes: int, device_bytes: int, residue_bytes: int
) -> list[Phase]:
    """The phases in order: rollout, train, update, resume.

    kv_bytes: the KV pool. device_bytes: memory of the GPU. residue_bytes: what stays while the
    engine sleeps: the driver's context and small tables. Raises OutOfMemory naming each phase
    that does not fit, with its arithmetic.
    """
    residue, weights = {"engine residue": residue_bytes}, {"weights": engine.weights}
    awake = {"KV": kv_bytes, "graphs": engine.graphs}
    phases = [
        Phase(
            "rollout",
            residue
            | weights
            | awake
            | {"activations": engine.workspace, "trainer": trainer.asleep},
        ),
        Phase("train", residue | {"trainer": trainer.training}),
        Phase(
            "update",
            residue | weights | {"shadow": engine.shadow, "trainer": trainer.publishing},
        ),
        Phase("resume", residue | weights | awake | {"trainer": trainer.asleep}),
    ]
    _refuse(phases, device_bytes)
    return phases


def check_phases(
    memory: MemoryConfig, engine: Needs, *, kv_bytes: int, device_bytes: int
) -> list[Phase]:
    """`plan_phases` for the trainer that the configuration describes; logs every phase.

    Nothing is planned for a trainer of which nothing was said. Raises OutOfMemory.
    """
    trainer = TrainerNeeds(
        asleep=memory.trainer_bytes,
        training=memory.trainer_training_bytes,
        publishing=memory.trainer_publishing_bytes,
    )
    if trainer == TrainerNeeds():
        return []
    phases = plan_phases(
        engine,
        trainer,
        kv_bytes=kv_bytes,
        device_bytes=device_bytes,
        residue_bytes=RESIDUE_BYTES,
    )
    for phase in phases:
        logger.info("memory of phase %s", phase.describe())
    return phases


def _refuse(phases: list[Phase], device_bytes: int) -> None:
    too_large = [phase for phase in phases if phase.num_bytes > device_bytes]
    if not too_large:
        return
    over = "; ".join(
        f"{phase.describe()}, {gib(phase.num_bytes - device_bytes)} too much" for phase in too_large
    )
    raise OutOfMemory(
        f"the device has {gib(device_bytes)}. {over}. Lower cache.memory_bytes, offload more of "
        "the trainer, or use more GPUs",
        field=too_large[0].name,
    )
