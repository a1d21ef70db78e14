"""The sources of masks that every replica has."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import EngineConfig
from engine.protocol import EngineFacts
from rollout.masks.allowed import AllowedTokens
from rollout.masks.base import MaskSource
from rollout.masks.gate import MaskGate
from rollout.masks.grammar.source import GrammarMasks
from rollout.masks.grammar.vocabulary import load_vocabulary


def mask_gate(
    config: EngineConfig,
    facts: EngineFacts,
    others: Sequence[MaskSource],
    *,
    loads_grammars: bool = False,
) -> MaskGate:
    """The gate of a replica, over the sources of `Request.allowed_token_ids` and `Request.grammar`
    and over `others`. loads_grammars: what every grammar needs is loaded now."""
    size = facts.vocab_size
    grammars = GrammarMasks(
        lambda: load_vocabulary(config.model, size), vocab_size=size, eos_ids=facts.eos_ids
    )
    if loads_grammars:
        grammars.load()
    return MaskGate(
        [AllowedTokens(size), grammars, *others],
        vocab_size=size,
        timeout_s=config.scheduler.mask_timeout_s,
    )
