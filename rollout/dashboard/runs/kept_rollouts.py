"""Lines in which a run keeps its replies: of rollouts.jsonl with tokens, of samples.jsonl without.

A line is a group: a prompt and the replies to it (`recipes/run/kept_rollouts.py` writes them).
"""

from __future__ import annotations

import math
from itertools import chain, repeat
from typing import Any

from msgspec import Struct

from rollout.dashboard.numbers import gap, told
from rollout.dashboard.rollouts import RolloutGroup, Sample, Tokens
from rollout.dashboard.runs.lenient_json import number_of, read_as

ROLLOUTS = "rollouts.jsonl"
SAMPLES = "samples.jsonl"


class KeptReply(Struct, kw_only=True):
    """One reply, without its tokens. reward: None of one that could not be graded, for which
    `failed` is the reason. length: all of its tokens, however many are kept."""

    text: str
    reward: Any = None
    failed: str = ""
    length: int = 0
    finish: str = ""


class KeptGroup(Struct, kw_only=True):
    """What a list of replies needs of a line of rollouts.jsonl."""

    step: float
    prompt: str
    samples: list[KeptReply]
    answer: str = ""


class _TokenReply(KeptReply, kw_only=True):
    """With the first of its tokens. spans: [version, first token, behind the last]."""

    tokens: list[str] = []
    logprobs: list[Any] = []
    entropies: list[Any] = []
    spans: list[tuple[int, int, int]] = []


class _TokenGroup(KeptGroup, kw_only=True):
    samples: list[_TokenReply]  # type: ignore[assignment]


class _TextGroup(Struct, kw_only=True):
    """A line of samples.jsonl."""

    step: float
    question: str = ""
    answer: str = ""
    replies: list[str] = []
    rewards: list[Any] = []
    failed: list[str] = []


def read_group(line: bytes) -> KeptGroup | None:
    """The group of a line of either file, without tokens; None for what is no group."""
    kept = read_as(line, KeptGroup)
    if kept is None:
        kept = _of_texts(line)
    return kept if kept is not None and math.isfinite(kept.step) and kept.step >= 0 else None


def read_tokens(line: bytes, name: str) -> RolloutGroup | None:
    """The group of a line of either file as the page shows it; None for what is no group."""
    kept: KeptGroup | None = read_as(line, _TokenGroup) or _of_texts(line)
    if kept is None:
        return None
    return RolloutGroup(
        group=name,
        step=int(kept.step),
        prompt=kept.prompt,
        answer=kept.answer,
        samples=[_sample(number, reply) for number, reply in enumerate(kept.samples)],
    )


def reward_of(reply: KeptReply) -> float | None:
    """The reward, NaN and infinities too; None of a reply that has none."""
    return None if reply.failed or reply.reward is None else number_of(reply.reward)


def _of_texts(line: bytes) -> KeptGroup | None:
    found = read_as(line, _TextGroup)
    if found is None:
        return None
    rewards = chain(found.rewards, repeat(None))
    failed = chain(found.failed, repeat(""))
    return KeptGroup(
        step=found.step,
        prompt=found.question,
        answer=found.answer,
        samples=[
            KeptReply(text=text, reward=reward, failed=why)
            for text, reward, why in zip(found.replies, rewards, failed, strict=False)
        ],
    )


def _sample(number: int, reply: KeptReply) -> Sample:
    return Sample(
        sample=number,
        text=reply.text,
        reward=told(reward_of(reply)),
        length=reply.length,
        finish=reply.finish,
        note=f"not graded: {reply.failed}" if reply.failed else "",
        tokens=_tokens(reply) if isinstance(reply, _TokenReply) and reply.tokens else None,
    )


def _tokens(reply: _TokenReply) -> Tokens:
    num = len(reply.tokens)
    versions = [""] * num
    behind = 0
    for version, first, end in reply.spans:
        # They follow each other: of one that overlaps, what lies behind the one before.
        first, end = max(first, behind), min(end, num)
        if first < end:
            versions[first:end] = [str(version)] * (end - first)
            behind = end
    return Tokens(
        texts=reply.tokens,
        logprobs=_nats(reply.logprobs, num),
        entropies=_nats(reply.entropies, num),
        versions=versions if reply.spans else None,
    )


def _nats(values: list[Any], num: int) -> list[float | None] | None:
    """A number a token; None where there is not one for each."""
    return [gap(number_of(value)) for value in values] if len(values) == num else None
