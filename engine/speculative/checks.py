"""What the options of speculative decoding take for granted, checked once at the start."""

from __future__ import annotations

from engine.config import (
    DRAFT_LADDER,
    MAX_DRAFT_TOKENS,
    MAX_VERIFY_ROWS,
    EngineConfig,
    SpeculativeConfig,
)
from engine.errors import InvalidRequest, UnsupportedOption

_NOT_BUILT = ("eagle3", "draft")
_PLANS_ON_HOST = "flashinfer"


def check_speculative(config: SpeculativeConfig, *, num_labels: int) -> None:
    """Refuse by name what cannot be honoured.

    num_labels: of a classifier; 0 of a model that generates. Raises UnsupportedOption and
    InvalidRequest.
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
    if config.enabled and num_labels:
        raise UnsupportedOption(
            "a classifier samples no tokens, so none can be drafted; leave the option out",
            field="speculative",
        )
    if config.allow_forced_acceptance and not config.enabled:
        raise InvalidRequest(
            "without drafts there is nothing to accept; choose a drafter with --speculative, or "
            "leave the option out",
            field="allow_forced_acceptance",
        )


def check_attention(name: str) -> None:
    """Refuse a back end that cannot serve steps with drafts. Raises UnsupportedOption."""
    if name == _PLANS_ON_HOST:
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
    most = next(k for k in DRAFT_LADDER if k >= config.speculative.draft_tokens)
    return max(rows, min(MAX_VERIFY_ROWS, rows * (most + 1)))
