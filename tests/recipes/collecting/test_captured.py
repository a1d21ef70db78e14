"""From the record of a captured rollout to what a trainer learns from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recipes.algorithms.presets import preset
from recipes.collecting.captured import branches_of, captured_batch
from recipes.trainers.route_shelf import RouteShelf
from rollout.scheduler.routes.reply_fields import encoded_routes


def prompt(ids: list[int], call: int = 0) -> dict[str, Any]:
    return {"sampled": False, "call": call, "token_ids": ids}


def reply(ids: list[int], call: int, *, new: bool = True, finish: str = "stop") -> dict[str, Any]:
    return {
        "sampled": True,
        "new": new,
        "call": call,
        "token_ids": ids,
        "logprobs": [-float(i) for i in ids],
        "temperature": 1.0,
        "weight_versions": [{"version": str(call), "start": 0, "end": len(ids)}],
        "finish_reason": finish,
    }


def record(*branches: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    calls = {segment["call"] for branch in branches for segment in branch}
    return {
        "complete": True,
        "reward": 1.0,
        "calls": [{"call": call, "reward": None} for call in sorted(calls)],
        "branches": [{"segments": branch} for branch in branches],
        **fields,
    }


TWO_TURNS = [prompt([1, 2]), reply([3, 4], 0), prompt([5], 1), reply([6], 1, finish="length")]


def test_a_branch_is_one_sequence_whose_sampled_tokens_are_kept() -> None:
    (branch,) = branches_of(record(TWO_TURNS))
    t = branch.trajectory
    assert (t.prompt_ids.tolist(), t.response_ids.tolist()) == ([1, 2], [3, 4, 5, 6])
    assert t.rollout_logprobs.tolist() == [-3, -4, 0, -6]
    assert branch.kept.tolist() == [True, True, False, True]
    assert [(s.version, s.start, s.end) for s in t.spans] == [(0, 0, 2), (1, 3, 4)]
    assert (t.reward, t.failed, t.truncated) == (1.0, "", True)


def test_a_reply_that_branches_share_is_learnt_once() -> None:
    other = [prompt([1, 2]), reply([3, 4], 0, new=False), prompt([7], 2), reply([8], 2)]
    first, second = branches_of(record(TWO_TURNS, other))
    assert first.kept.tolist() == [True, True, False, True]
    assert second.kept.tolist() == [False, False, False, True]
    assert branches_of(record([prompt([1]), reply([2], 0, new=False)])) == []


def test_what_came_only_in_part_is_left_out() -> None:
    broken = [*TWO_TURNS, prompt([9], 2), reply([1], 2, finish="abort")]
    (branch,) = branches_of(record(broken, complete=False))
    assert branch.trajectory.response_ids.tolist() == [3, 4, 5, 6]
    assert branch.trajectory.failed.startswith("incomplete")
    assert branches_of(record([prompt([1]), reply([2], 0, finish="abort")])) == []


def test_the_reward_is_that_of_the_last_call_or_of_the_rollout() -> None:
    calls = [{"call": 0, "reward": 5.0}, {"call": 1, "reward": 0.0}]
    assert branches_of(record(TWO_TURNS, calls=calls))[0].trajectory.reward == 0.0
    none = branches_of(record(TWO_TURNS, reward=None))[0].trajectory
    assert none.failed.startswith("reward")


def test_a_batch_compares_rollouts_and_weighs_sampled_tokens() -> None:
    other = [prompt([1, 2]), reply([3, 4], 0, new=False), prompt([7], 2), reply([8], 2)]
    group = [record(TWO_TURNS, other), record(TWO_TURNS, reward=0.0)]
    lost = [record(TWO_TURNS, complete=False), record(TWO_TURNS, reward=None)]
    batch = captured_batch([[*group, *lost], lost], preset("dr_grpo", 8), 10)
    assert [a[0] for a in batch.advantages] == [0.5, 0.5, -0.5]
    assert batch.kept is not None
    assert [int(kept.sum()) for kept in batch.kept] == [3, 1, 3]
    np.testing.assert_allclose(batch.weights, 1 / (3 * 10))
    assert len(batch.trajectories) == 3


def test_an_algorithm_that_needs_more_is_refused() -> None:
    with pytest.raises(ValueError, match="group-relative"):
        captured_batch([], preset("ppo", 8), 10)


def test_routes_of_a_branch_are_put_on_a_shelf_as_far_as_it_is_learnt_from() -> None:
    broken = [*TWO_TURNS, prompt([9], 2), reply([1], 2, finish="abort")]
    given, shelf = record(TWO_TURNS, broken), RouteShelf()
    routes = np.arange(7 * 2, dtype=np.uint8).reshape(7, 2, 1)
    given["branches"][1] |= encoded_routes(routes, "uint8")
    bare, routed = branches_of(given, shelf=shelf)
    assert bare.trajectory.routes is None
    assert routed.trajectory.routes is not None
    # Six tokens, of which the last has no route.
    assert shelf.get(routed.trajectory.routes).tolist() == routes[:5].tolist()
    assert all(b.trajectory.routes is None for b in branches_of(given))
