"""Options of asynchronous training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

StaleKv = Literal["keep", "recompute"]


@dataclass(frozen=True, kw_only=True)
class AsyncOptions:
    """Whether rollouts go on while the policy learns, and how old they may become."""

    asynchronous: Annotated[bool, tyro.conf.arg(name="async")] = False
    """Sample on while the policy learns. With --rollout-gpus engines of their own do, beside the
    trainer; in one process engine and trainer take turns by counts, so that a seed repeats the
    run."""
    max_staleness: int = 1
    """Versions that the weights may go on while a group waits to be trained: so many steps'
    groups are started ahead. 0 is the synchronous run."""
    strict_age: bool = False
    """Train groups in the order they were started, so that none is older; else a slow group is
    passed, and is trained when it is whole."""
    bypass: bool = True
    """Clip the ratio to the policy that sampled a token. --no-bypass clips the ratio to the policy
    before the update, and weights that by how it differs from the one that sampled (--is-level)."""
    stale_kv: StaleKv = "keep"
    """What an update does to the KV of replies that go on over it: keep it, or compute it again by
    the new weights."""
    engine_steps: int | None = None
    """Engine steps that one update lasts, where both are in one process; None takes half of the
    longest reply."""
