"""Build a replica from its configuration."""

from __future__ import annotations

from engine.config import EngineConfig
from rollout.process_replica import ProcessReplica
from rollout.replica import InlineReplica, Replica


def launch(config: EngineConfig, *, process: bool = False) -> Replica:
    """Load the model and return a replica that can step.

    process: run it in a spawned process instead of this one.

    Raises ModelError if the model cannot be loaded, OutOfMemory if it does not fit.
    """
    if process:
        return ProcessReplica(config)
    # Torch comes with the executor, and only a process that steps should pay for it.
    from engine.executor import build_executor

    return InlineReplica(config, build_executor(config))
