"""Build a replica from its configuration, or read what one would load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config import EngineConfig, LoadFormat
from rollout.ranks.ranked_executor import build_executor
from rollout.replica.base import Replica
from rollout.replica.inline import InlineReplica
from rollout.replica.spawned import ProcessReplica

if TYPE_CHECKING:
    from engine.executor import Checkpoint


def launch(config: EngineConfig, *, process: bool = False) -> Replica:
    """Load the model and return a replica that can step.

    process: run it in a spawned process instead of this one. With several tensor-parallel
    ranks, the further ones have a process each either way.

    Raises ModelError if the model cannot be loaded, OutOfMemory if it does not fit.
    """
    if process:
        return ProcessReplica(config)
    return InlineReplica(config, build_executor(config))


def read_checkpoint(model: str, load_format: LoadFormat = "auto", seed: int = 0) -> Checkpoint:
    """Configuration and tensors that an engine of the same arguments loads, for a trainer that
    is to start from equal weights. Raises ModelError."""
    from engine import executor

    return executor.read_checkpoint(model, load_format, seed)
