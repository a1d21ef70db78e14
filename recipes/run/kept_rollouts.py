"""Lines of rollouts.jsonl: replies of a step token by token, for whoever looks at them.

A line is a group, for example (`rollout/dashboard/runs/kept_rollouts.py` reads it)::

    {"step": 3, "prompt": "Which is ...", "answer": "98", "samples": [{"text": "98", "reward": 1.0,
     "failed": "", "finish": "stop", "length": 2, "tokens": ["98", "<eos>"],
     "logprobs": [-0.1213, 0.0], "entropies": [0.3712, 0.0], "spans": [[2, 0, 2]]}]}

spans: [version, first token, behind the last]. entropies: where they were asked for. A step's lines
have a bounded size: of long replies the first tokens are kept, `TOKENS_A_STEP` of all replies
together, and of long texts both ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from engine.protocol import FloatArray, IntArray
from recipes.types import Group, Trajectory

TOKENS_A_STEP = 16_384
TEXT_CHARS = 20_000
"""Longest text of a prompt or a reply."""


def rollout_lines(
    step: int, groups: Sequence[Group], token_bytes: Mapping[int, bytes], *, num: int
) -> bytes:
    """The first `num` groups, a line each. token_bytes: by id (`Tokenizer.added_bytes`)."""
    kept = groups[:num]
    replies = sum(len(group.trajectories) for group in kept)
    most = TOKENS_A_STEP // max(replies, 1)
    lines = [_group(step, group, token_bytes, most) for group in kept]
    # Numbers that JSON does not know become null here.
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


def _group(step: int, group: Group, token_bytes: Mapping[int, bytes], most: int) -> dict[str, Any]:
    prompt = "".join(pieces(group.trajectories[0].prompt_ids, token_bytes))
    return {
        "step": step,
        "prompt": shortened(prompt),
        "answer": shortened(group.problem.answer),
        "samples": [_reply(reply, token_bytes, most) for reply in group.trajectories],
    }


def _reply(reply: Trajectory, token_bytes: Mapping[int, bytes], most: int) -> dict[str, Any]:
    entropies = {} if reply.entropies is None else {"entropies": _short(reply.entropies[:most])}
    return entropies | {
        "text": shortened(reply.text),
        "reward": None if reply.failed else reply.reward,
        "failed": reply.failed,
        "finish": "length" if reply.truncated else "stop",
        "length": len(reply.response_ids),
        "tokens": pieces(reply.response_ids[:most], token_bytes),
        "logprobs": _short(reply.rollout_logprobs[:most]),
        "spans": [
            (span.version, span.start, min(span.end, most))
            for span in reply.spans
            if span.start < most
        ],
    }


def _short(nats: FloatArray) -> list[float]:
    """To four places: a line of JSON has them as text."""
    found: list[float] = nats.astype(np.float64).round(4).tolist()
    return found


def pieces(ids: IntArray, token_bytes: Mapping[int, bytes]) -> list[str]:
    """The text that each token adds; a character of several tokens is with the last of them. What
    is no UTF-8 is U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = [decoder.decode(token_bytes[token]) for token in ids.tolist()]
    if found:
        found[-1] += decoder.decode(b"", final=True)
    return found


def shortened(text: str) -> str:
    """A text, or the two ends of a long one with a word on what is left out."""
    left_out = len(text) - TEXT_CHARS
    if left_out <= 0:
        return text
    half = TEXT_CHARS // 2
    return f"{text[:half]}\n[... {left_out:,} characters ...]\n{text[-half:]}"
