"""Builds what drafts, from the configuration."""

from __future__ import annotations

from engine.config import SpeculativeConfig
from engine.protocol import DraftSources, IntArray
from rollout.cache.manager import CacheManager
from rollout.scheduler.speculative.drafts import Drafts
from rollout.scheduler.table import SlotTable


class _Fixed:
    def __init__(self, k: int) -> None:
        self._k = k

    def choose(self, num_rows: int) -> int:
        return self._k

    def planned(self, step: int, num_rows: int, k: int) -> None:
        pass

    def observe(self, step: int, drafted: IntArray, counts: IntArray) -> None:
        pass


class _NoHistory:
    def enter(self, slot: int, key: bytes) -> None:
        pass

    def leave(self, slot: int, *, prompt_len: int, size: int, version: int, keep: bool) -> None:
        pass

    def take(self) -> DraftSources | None:
        return None

    def set_version(self, version: int) -> None:
        pass

    def clear(self) -> None:
        pass


def build_drafts(
    config: SpeculativeConfig, table: SlotTable, cache: CacheManager, *, device: str
) -> Drafts | None:
    """What drafts over `table`; None where nothing is drafted. device: of the ranks."""
    if not config.enabled:
        return None
    controller, history = _Fixed(config.draft_tokens), _NoHistory()
    return Drafts(config, table, cache, controller=controller, history=history)
