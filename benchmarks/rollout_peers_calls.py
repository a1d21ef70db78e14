"""What `benchmarks/rollout_peers.py` asks of an engine, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Ask(NamedTuple):
    """One request: ids in, so many tokens out."""

    prompt_ids: list[int]
    num_tokens: int


class Answer(NamedTuple):
    """What came back: how many tokens and how many logprobs."""

    num_tokens: int
    num_logprobs: int


Run = Callable[[list[Ask]], list[Answer]]
"""Answers a batch of requests, in order; raises TimeoutError past its deadline."""
