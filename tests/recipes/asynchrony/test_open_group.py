"""A group whose replies come in parts, over updates of the weights."""

from __future__ import annotations

import numpy as np
import pytest

from engine.protocol import FinishReason, RequestOutput, VersionSpan, decode, encode
from recipes.asynchrony.open_group import OpenGroup, was_withdrawn
from recipes.types import Problem, UnfinishedGroup
from tests.helpers.engines import request

REQUESTS = [request(f"r{index}", [5, 6], seed=index) for index in range(3)]
WITHDRAWN = FinishReason(type="abort", message="withdrawn")
STOP = FinishReason(type="stop", matched=0)


def opened() -> OpenGroup:
    problem = Problem(question="?", answer="!", key="k")
    return OpenGroup(position=3, seed=11, index=1, problem=problem, requests=REQUESTS)


def output(
    rid: str, tokens: list[int], version: int, finish: FinishReason, start: int = 0
) -> RequestOutput:
    return RequestOutput(
        rid=rid,
        start=start,
        token_ids=np.array(tokens, np.int32),
        logprobs=np.array(tokens, np.float32) / -10,
        finish=finish,
        prompt_tokens=2,
        spans=[VersionSpan(version, start, start + len(tokens))] if tokens else [],
    )


def test_a_reply_goes_on_behind_the_tokens_that_it_has() -> None:
    group = opened()
    group.take(output("r0", [1, 2, 0], 4, STOP))
    group.take(output("r1", [7, 8], 4, WITHDRAWN))
    group.take(output("r2", [], 4, WITHDRAWN))
    assert not group.is_whole
    first, second = group.wanted()
    assert (first.rid, second.rid) == ("r1", "r2")
    assert first.output_ids is not None and first.output_ids.tolist() == [7, 8]
    assert first.output_ids.dtype == np.int32 and first.seed == REQUESTS[1].seed
    assert second.output_ids is None

    group.take(output("r1", [9], 5, WITHDRAWN, start=2))
    again = group.wanted()[0].output_ids
    assert again is not None and again.tolist() == [7, 8, 9]
    group.take(output("r1", [6, 0], 6, STOP, start=3))
    group.take(output("r2", [3, 0], 6, STOP))
    assert group.is_whole and group.wanted() == []
    whole = group.replies()[1][1]
    assert whole.token_ids.tolist() == [7, 8, 9, 6, 0]
    assert whole.logprobs.tolist() == pytest.approx([-0.7, -0.8, -0.9, -0.6, 0.0])
    assert [(s.version, s.start, s.end) for s in whole.spans] == [(4, 0, 2), (5, 2, 3), (6, 3, 5)]
    assert whole.finish == STOP and whole.start == 0


def test_what_a_checkpoint_has_of_a_group_makes_it_again() -> None:
    group = opened()
    group.take(output("r0", [1, 2, 0], 4, STOP))
    group.take(output("r1", [7, 8], 4, WITHDRAWN))
    read = decode(encode([group.unfinished()]), list[UnfinishedGroup])
    again = OpenGroup.of(read[0], REQUESTS)
    assert (again.position, again.seed, again.index) == (3, 11, 1)
    assert again.problem == group.problem
    for ours, theirs in zip(again.wanted(), group.wanted(), strict=True):
        assert ours.rid == theirs.rid
        assert np.array_equal(ours.output_ids, theirs.output_ids)  # type: ignore[arg-type]
    assert again.outputs["r0"].logprobs.tolist() == group.outputs["r0"].logprobs.tolist()


def test_only_what_its_caller_took_back_goes_on() -> None:
    refused = FinishReason(type="abort", message="too long", error="ContextTooLong")
    assert was_withdrawn(output("r", [1], 0, WITHDRAWN))
    assert not was_withdrawn(output("r", [1], 0, STOP))
    assert not was_withdrawn(output("r", [], 0, refused))
