"""Seeds of samples that several replicas share out: no two alike, and the same for one replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.protocol import Request, RequestOutput, SamplingParams
from recipes.collecting.collect import rollout


class Noting:
    """An actor that notes what it is asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        self.requests += requests
        ids, logprobs = np.zeros(1, np.int32), np.zeros(1, np.float32)
        return [
            RequestOutput(rid=request.rid, start=0, token_ids=ids, logprobs=logprobs)
            for request in requests
        ]


class Prompts:
    """One prompt for every problem."""

    stop_ids: list[int] = []

    def prompt_ids(self, problem: object) -> Any:
        return np.array([1, 2], np.int32)


def seeds(shares: list[tuple[int, int]], *, seed: int) -> list[int]:
    """Of 4 samples of each problem; shares: (first, number) of each replica's problems."""
    found: list[int] = []
    for first, count in shares:
        actor = Noting()
        rollout(
            actor,
            Prompts(),
            [object()] * count,
            SamplingParams(),
            samples=4,
            seed=seed,
            first=first,
        )
        found += [request.seed for request in actor.requests]
    return found


def test_no_two_samples_of_a_step_are_alike_however_they_are_shared_out() -> None:
    alone = seeds([(0, 6)], seed=11)
    assert len(set(alone)) == 24
    assert seeds([(0, 2), (2, 1), (3, 3)], seed=11) == alone
    assert not set(alone) & set(seeds([(0, 6)], seed=12))
