"""The strictest reward: the reply is the answer and nothing else."""

from __future__ import annotations


def exact_match(reply: str, answer: str) -> float:
    """1.0 if reply and answer are the same text up to white space around them, else 0.0."""
    return float(reply.strip() == answer.strip())
