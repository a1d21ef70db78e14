"""The scheduler of a replica: one, or one a copy of the model."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import EngineConfig
from engine.protocol import EngineFacts, Request
from rollout.cache.manager import CacheManager
from rollout.scheduler.copies.divided import DividedScheduler
from rollout.scheduler.scheduler import Scheduler

ReplicaScheduler = Scheduler | DividedScheduler


def build_scheduler(
    config: EngineConfig, facts: EngineFacts, prepared: Callable[[Request], bool]
) -> ReplicaScheduler:
    """What a leader plans with. facts: of the ranks, which all have as many pages. prepared: as in
    `Scheduler`."""
    copies = [_scheduler(config, facts, prepared) for _ in range(facts.dp_size)]
    if len(copies) == 1:
        return copies[0]
    return DividedScheduler(
        copies,
        kv_tokens=facts.num_pages * facts.page_size,
        max_waiting=config.scheduler.max_waiting,
    )


def _scheduler(
    config: EngineConfig, facts: EngineFacts, prepared: Callable[[Request], bool]
) -> Scheduler:
    cache = CacheManager(
        num_pages=facts.num_pages,
        page_size=facts.page_size,
        prefix_cache=config.cache.prefix_cache,
    )
    return Scheduler(
        config.scheduler,
        cache,
        context_length=facts.context_length,
        vocab_size=facts.vocab_size,
        num_labels=facts.num_labels,
        experts=facts.experts,
        keeps_routes=facts.keeps_routes,
        version=config.weight_version,
        speculative=config.speculative,
        device=facts.device,
        prepared=prepared,
    )
