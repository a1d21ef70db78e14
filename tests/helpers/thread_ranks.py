"""The ranks of a replica as threads of one process: real collectives without spawning."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.config import EngineConfig, ParallelConfig
from engine.executor import LocalExecutor
from engine.parallel.collectives import Collectives
from engine.parallel.connect import connect
from engine.parallel.mesh import Mesh
from engine.protocol import BesideSteps, EngineCommand, Reply, StepMasks, StepPlan, StepResult
from rollout.ranks.step_executor import PendingStep
from rollout.replica.weight_queue import PendingReply

T = TypeVar("T")


def on_ranks(tp_size: int, run: Callable[[int], T]) -> list[T]:
    """What `run(rank)` returns on each rank, all running at once; the first error is raised."""
    with ThreadPoolExecutor(tp_size) as pool:
        running = [pool.submit(run, rank) for rank in range(tp_size)]
        return [future.result(timeout=120) for future in running]


def with_collectives(
    tp_size: int,
    run: Callable[[Mesh, Collectives], T],
    *,
    dp_size: int = 1,
    timeout_s: float = 30.0,
) -> list[T]:
    """`run` on every rank of a connected gloo group, or of several copies of the model."""
    parallel = ParallelConfig(tp_size=tp_size, dp_size=dp_size)
    with tempfile.TemporaryDirectory() as folder:

        def rank_main(rank: int) -> T:
            mesh = Mesh.of(parallel, rank)
            place = str(Path(folder) / "meeting")
            cpu = torch.device("cpu")
            group = connect(mesh, cpu, meeting_place=place, timeout_s=timeout_s)
            with torch.inference_mode():
                return run(mesh, group)

        return on_ranks(parallel.num_ranks, rank_main)


@dataclass(frozen=True)
class AllReplies:
    """A command that every rank runs beside steps."""

    pending: Sequence[PendingReply]

    def done(self) -> bool:
        return all(each.done() for each in self.pending)

    def result(self) -> Reply:
        first, *_ = [each.result() for each in self.pending]
        return first


@dataclass(frozen=True)
class MaskedOnAll:
    """A step with masked rows."""

    pending: Sequence[PendingStep]
    all_results: list[list[StepResult]]

    def result(self) -> StepResult:
        results = [each.result() for each in self.pending]
        self.all_results.append(results)
        return results[0]


class ThreadedExecutor:
    """Every rank of a replica in a thread of this process; results are rank 0's.

    all_results: those of every rank, step by step.
    """

    def __init__(self, config: EngineConfig) -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = str(Path(folder) / "meeting")
            self._ranks = on_ranks(
                config.parallel.tp_size,
                lambda rank: LocalExecutor(config, rank=rank, meeting_place=place),
            )
        self.facts = self._ranks[0].facts
        self.all_results: list[list[StepResult]] = []

    def execute(self, plan: StepPlan) -> StepResult:
        results = on_ranks(len(self._ranks), lambda rank: self._ranks[rank].execute(plan))
        self.all_results.append(results)
        return results[0]

    def launch(self, plan: StepPlan) -> MaskedOnAll:
        assert len(plan.masked), "threads run every other step to its end"
        pending = on_ranks(len(self._ranks), lambda rank: self._ranks[rank].launch(plan))
        return MaskedOnAll(pending, self.all_results)

    def mask(self, masks: StepMasks) -> None:
        on_ranks(len(self._ranks), lambda rank: self._ranks[rank].mask(masks))

    def handle(self, command: EngineCommand) -> Reply:
        return on_ranks(len(self._ranks), lambda rank: self._ranks[rank].handle(command))[0]

    def start(self, command: BesideSteps) -> AllReplies:
        return AllReplies([rank.start(command) for rank in self._ranks])

    def cancel(self, reason: str, *, group: str = "") -> None:
        for rank in self._ranks:
            rank.cancel(reason, group=group)

    def receive(self, tensors: Any, *, lasting: bool = False) -> None:
        named = list(tensors)
        for rank in self._ranks:
            rank.receive(named, lasting=lasting)

    def abort(self) -> None:
        for rank in self._ranks:
            rank.abort()

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()
