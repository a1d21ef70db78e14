"""The leader's side of the ranks: send plans and commands in order, collect results.

One rank lives in the leader's own process, so `execute` is a call; each further rank has a
process of its own, which `rollout.ranks` starts and sends the same structs to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig, LoadFormat
from engine.protocol import BesideSteps, EngineCommand, Reply, StepMasks, StepPlan, StepResult

if TYPE_CHECKING:
    from engine.pending import LaunchedStep
    from engine.weights.checkpoint import Checkpoint as Checkpoint
    from engine.weights.lane import PendingCommand


class LocalExecutor:
    """One rank in this process; `rollout.ranks.step_executor` says what a leader needs of it."""

    def __init__(self, config: EngineConfig, *, rank: int = 0, meeting_place: str = "") -> None:
        from engine.worker import Worker

        self._worker = Worker(config, rank=rank, meeting_place=meeting_place)
        self.facts = self._worker.facts

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step to its end."""
        return self._worker.launch(plan).result()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue one step; its `result` waits for it. Later steps may be queued before."""
        return self._worker.launch(plan)

    def mask(self, masks: StepMasks) -> None:
        """Queue the sampling of the step launched last, which waits for it."""
        self._worker.mask(masks)

    def handle(self, command: EngineCommand) -> Reply:
        """Run one command that is no step."""
        return self._worker.handle(command)

    def start(self, command: BesideSteps) -> PendingCommand:
        """Run a command beside steps; its `result` is for when it is `done`."""
        return self._worker.start(command)

    def cancel(self, reason: str, *, group: str = "") -> None:
        """Have transfers in progress end early."""
        self._worker.cancel(reason, group=group)

    def receive(self, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False) -> None:
        """Feed the open update with (Hugging Face name, torch.Tensor) of this process.

        lasting: the tensors stay as they are until the commit. Else each is read before the
        next is asked for, and no reference to it is kept.
        """
        self._worker.receive(tensors, lasting=lasting)

    def abort(self) -> None:
        """Give up on the other ranks: a call that waits for them ends. From any thread."""
        self._worker.abort()

    def close(self) -> None:
        """Drop the rank; its memory goes with it."""
        self._worker.close()
        del self._worker


def build_executor(
    config: EngineConfig, *, rank: int = 0, meeting_place: str = ""
) -> LocalExecutor:
    """Build one rank of a replica: the only one, unless `config.parallel` says otherwise.

    meeting_place: path of a file that the ranks of this replica meet at, and no others.
    Raises ModelError, OutOfMemory, and EngineDead when another rank does not come.
    """
    return LocalExecutor(config, rank=rank, meeting_place=meeting_place)


def read_checkpoint(model: str, load_format: LoadFormat = "auto", seed: int = 0) -> Checkpoint:
    """What an engine would load, for a trainer that starts from the same weights."""
    from engine.weights import checkpoint

    return checkpoint.read_checkpoint(model, load_format, seed)
