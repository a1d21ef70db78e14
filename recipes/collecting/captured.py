"""Training on rollouts that a server captured: an agent that only knows a base URL made them.

`docs/sessions.md` says how a rollout is opened, used and rewarded; `GET /rollouts/ID` gives the
record that these functions take. Legend: S rollouts of a group, N branches of all groups, K
response tokens of a branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.protocol import VersionSpan
from recipes.algorithms.advantages import advantages
from recipes.algorithms.aggregation import token_weights
from recipes.algorithms.presets import Algorithm
from recipes.trainers.route_shelf import RouteShelf
from recipes.types import Batch, BoolArray, Trajectory
from rollout.client import routed_experts

Record = Mapping[str, Any]

_WHOLE = ("stop", "length")


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One branch of a rollout, from its first prompt to its last reply.

    trajectory: the response begins with the first sampled token and has what came between replies
        too, such as the results of tools, with a log-probability of 0.
    kept: bool [response_len], the sampled tokens, each in one branch of a rollout.
    """

    trajectory: Trajectory
    kept: BoolArray


def branches_of(
    record: Record,
    *,
    version_of: Callable[[str], int] = int,
    shelf: RouteShelf | None = None,
) -> list[Branch]:
    """The branches of one rollout that have sampled tokens of their own, in order.

    Their reward is that of the call that ends them, else that of the rollout. A rollout that is
    not complete, or has no reward, gives branches that say so in `failed`. version_of: what the
    trainer counts a version as, which the server calls by a label. shelf: takes the routes of
    branches that have them (`docs/routed_experts.md`), for a trainer that replays them.
    """
    rewards = {call["call"]: call["reward"] for call in record["calls"]}
    found = []
    for branch in record["branches"]:
        segments = _whole(branch["segments"])
        if any(segment["sampled"] and segment["new"] for segment in segments):
            reward = rewards.get(segments[-1]["call"])
            reward = record["reward"] if reward is None else reward
            made = _branch(record, segments, reward, version_of)
            found.append(made if shelf is None else _routed(made, branch, shelf))
    return found


def captured_batch(
    groups: Sequence[Sequence[Record]],
    algorithm: Algorithm,
    max_new_tokens: int,
    *,
    version_of: Callable[[str], int] = int,
    shelf: RouteShelf | None = None,
) -> Batch:
    """One update over rollouts, those of a group being of the same task: their rewards are compared
    by the algorithm's estimator, and each branch has the advantage of its rollout.

    Rollouts that are not complete or have no reward are left out. Raises ValueError for an
    algorithm that needs more than rewards: a critic, a reference, a greedy reply.
    """
    if not algorithm.compares_group or algorithm.kl_coef > 0:
        raise ValueError("captured rollouts are trained by group-relative advantages without KL")
    branches: list[Branch] = []
    scores: list[float] = []
    for group in groups:
        rollouts = [branches_of(each, version_of=version_of, shelf=shelf) for each in group]
        graded = [r for r in rollouts if r and not any(b.trajectory.failed for b in r)]
        earned = [float(np.mean([b.trajectory.reward for b in rollout])) for rollout in graded]
        if len(graded) < 2:
            continue
        better_S = advantages(torch.tensor([earned]), algorithm.advantage)[0].tolist()
        for rollout, better in zip(graded, better_S, strict=True):
            branches += rollout
            scores += [better] * len(rollout)
    lengths = [int(branch.kept.sum()) for branch in branches]
    return Batch(
        trajectories=tuple(branch.trajectory for branch in branches),
        advantages=tuple(
            np.full(len(branch.kept), score, np.float32)
            for branch, score in zip(branches, scores, strict=True)
        ),
        weights=token_weights(lengths, algorithm.loss_aggregation, max_new_tokens),
        kept=tuple(branch.kept for branch in branches),
    )


def _whole(segments: Sequence[Record]) -> Sequence[Record]:
    """The segments up to the last reply that came whole."""
    end = 0
    for number, segment in enumerate(segments, start=1):
        if segment["sampled"]:
            if segment["finish_reason"] not in _WHOLE:
                break
            end = number
    return segments[:end]


def _routed(made: Branch, branch: Record, shelf: RouteShelf) -> Branch:
    """A branch with its routes, as far as it is learnt from."""
    routes = routed_experts(branch)
    if routes is None:
        return made
    trajectory = made.trajectory
    num = len(trajectory.prompt_ids) + len(trajectory.response_ids) - 1
    # -1 of a signed dtype becomes the largest number.
    narrow = routes.dtype.itemsize == 1
    kept = routes[:num].astype(np.uint8) if narrow else routes[:num].astype(np.uint16)
    held = shelf.put(kept)
    return dataclasses.replace(made, trajectory=dataclasses.replace(trajectory, routes=held))


def _branch(
    record: Record,
    segments: Sequence[Record],
    reward: float | None,
    version_of: Callable[[str], int],
) -> Branch:
    start = next(i for i, segment in enumerate(segments) if segment["sampled"])
    prompt = [token for segment in segments[:start] for token in segment["token_ids"]]
    ids: list[int] = []
    logprobs: list[float] = []
    kept: list[bool] = []
    spans: list[VersionSpan] = []
    for segment in segments[start:]:
        tokens = segment["token_ids"]
        if segment["sampled"]:
            logprobs += segment["logprobs"]
            spans += [
                VersionSpan(version_of(s["version"]), len(ids) + s["start"], len(ids) + s["end"])
                for s in segment["weight_versions"]
            ]
        else:
            logprobs += [0.0] * len(tokens)
        kept += [segment["sampled"] and segment["new"]] * len(tokens)
        ids += tokens
    failed = "" if record["complete"] else "incomplete: a call was not recorded whole"
    failed = failed or ("" if reward is not None else "reward: the rollout has none")
    trajectory = Trajectory(
        prompt_ids=np.array(prompt, np.int32),
        response_ids=np.array(ids, np.int32),
        rollout_logprobs=np.array(logprobs, np.float32),
        spans=tuple(spans),
        text="",
        truncated=segments[-1]["finish_reason"] == "length",
        reward=reward or 0.0,
        correct=reward or 0.0,
        failed=failed,
    )
    return Branch(trajectory=trajectory, kept=np.array(kept, np.bool_))
