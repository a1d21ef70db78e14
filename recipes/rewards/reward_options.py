"""Options of the reward."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """What grades the replies, and how much of it may fail."""

    max_failed_share: float = 0.25
    """Share of the replies of five steps that may be without a grade; above it the run ends."""
