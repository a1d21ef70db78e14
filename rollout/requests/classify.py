"""Scores of token sequences by a sequence classifier, such as a reward model."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from engine.protocol import IntArray, Request, RequestOutput, SamplingParams
from rollout.replica.base import Replica
from rollout.requests.generate import generate

NOTHING_SAMPLED = SamplingParams(max_new_tokens=0)


def classify_request(rid: str, prompt_ids: IntArray, *, group: str = "") -> Request:
    """The request that has a classifier score `prompt_ids` (int32 [n]) at their last token.

    group: equal for sequences that begin alike; they are looked at together, so that what they
    share is computed once.
    """
    return Request(
        rid=rid,
        prompt_ids=prompt_ids,
        sampling=NOTHING_SAMPLED,
        seed=0,
        group=group,
        task="classify",
    )


def classify(replica: Replica, prompts: Iterable[IntArray]) -> list[RequestOutput]:
    """The outputs of scoring each of `prompts` (int32 [n]), in their order; `scores` are float32
    [num_labels], raw.

    One that is refused (too long, or sent to a model that generates) or fails has finish type
    "abort" with the error, and no scores; the others go on. Raises as `generate` does.
    """
    call = uuid.uuid4().hex
    requests = [classify_request(f"{call}-{n}", ids) for n, ids in enumerate(prompts)]
    return generate(replica, requests)
