"""Builds what drafts, from the configuration."""

from __future__ import annotations

from engine.config import SpeculativeConfig
from rollout.cache.manager import CacheManager
from rollout.scheduler.speculative.drafts import Drafts
from rollout.scheduler.speculative.history import DraftHistory
from rollout.scheduler.speculative.speculate import build_controller
from rollout.scheduler.table import SlotTable


def build_drafts(
    config: SpeculativeConfig, table: SlotTable, cache: CacheManager, *, device: str
) -> Drafts | None:
    """What drafts over `table`; None where nothing is drafted. device: of the ranks."""
    if not config.enabled:
        return None
    return Drafts(
        config,
        table,
        cache,
        controller=build_controller(config, device=device),
        history=DraftHistory(config, table.num_slots),
    )
