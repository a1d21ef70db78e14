"""What the options of speculative decoding take for granted, checked once at the start."""

from __future__ import annotations

from engine.config import EngineConfig, SpeculativeConfig
from engine.errors import InvalidRequest, UnsupportedOption

MAX_DRAFT_TOKENS = 7
MAX_VERIFIED = 512
"""Rows of a step that verifies drafts, each draft one."""
_NOT_BUILT = ("eagle3", "draft")
_PLANS_ON_HOST = "flashinfer"


def check_speculative(config: SpeculativeConfig, attention: str) -> None:
    """Refuse by name what cannot be served. attention: name of the back end that was chosen.

    Raises UnsupportedOption and InvalidRequest.
    """
    if config.method in _NOT_BUILT:
        raise UnsupportedOption(
            f"drafts by {config.method!r} are not built; use 'ngram' or 'auto'",
            field="speculative",
        )
    if not 1 <= config.draft_tokens <= MAX_DRAFT_TOKENS:
        raise InvalidRequest(
            f"{config.draft_tokens} is not from 1 to {MAX_DRAFT_TOKENS}", field="draft_tokens"
        )
    if attention == _PLANS_ON_HOST:
        raise UnsupportedOption(
            "flashinfer plans decode steps on the host, where the lengths of rows with drafts are "
            "not known; use 'split' or 'triton'",
            field="attention",
        )


def max_verified(config: EngineConfig) -> int:
    """Most rows of the model's step where every row decodes, drafts among them."""
    rows = config.scheduler.max_running
    if not config.speculative.enabled:
        return rows
    return max(rows, min(MAX_VERIFIED, rows * (config.speculative.draft_tokens + 1)))
