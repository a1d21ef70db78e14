"""Options of a reward model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RewardModelOptions:
    """How the model of --reward model:PATH or classify:URL is served and read."""

    reward_label: int = 0
    """Which score of a reward model with several labels is the reward, counted from 0."""
    reward_gpu: int | None = None
    """GPU of the reward model's engine, of a further process the next one; None shares the GPU of
    the process that it grades for."""
    reward_memory_gb: float = 1.0
    """Memory of the KV cache of the reward model's engine, GiB."""
    reward_tokenizer: str | None = None
    """Tokenizer of the model behind classify:URL; None takes the folder that the server names, if
    it is on this machine."""
