"""A rollout as it is read: its calls, and its branches from the first prompt to the last reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.protocol import CallNode, RolloutState
from rollout.http.updates.version_labels import VersionLabels
from rollout.requests.outputs import finite_logprobs
from rollout.scheduler.routes.reply_fields import encoded_routes


def transcript(state: RolloutState, labels: VersionLabels) -> dict[str, Any]:
    """The object that GET /rollouts/ID answers."""
    return {
        **summary(state),
        "calls": [
            {
                "call": number,
                "id": call.id,
                "failed": call.failed,
                "refused": call.refused,
                "open": call.open,
                "reward": call.reward,
            }
            for number, call in enumerate(state.calls)
        ],
        "branches": _branches(state.nodes, labels),
    }


def summary(state: RolloutState) -> dict[str, Any]:
    """What every route of a rollout says of it."""
    return {
        "id": state.rollout,
        "base_url": f"/rollouts/{state.rollout}/v1",
        "history": state.history,
        "return_routed_experts": state.return_routed_experts,
        "timeout_s": state.timeout_s,
        "complete": state.complete,
        "num_calls": state.num_calls,
        "reward": state.reward,
    }


def _branches(nodes: Sequence[CallNode], labels: VersionLabels) -> list[dict[str, Any]]:
    """A branch for every reply that no call went on from. A reply that several branches share is
    new in the first of them, so that its tokens count once."""
    parents = {node.parent for node in nodes}
    seen: set[int] = set()
    branches = []
    for leaf in (index for index in range(len(nodes)) if index not in parents):
        path, index = [], leaf
        while index >= 0:
            path.append(index)
            index = nodes[index].parent
        segments: list[dict[str, Any]] = []
        for index in reversed(path):
            segments += _segments(nodes[index], labels, new=index not in seen)
            seen.add(index)
        branches.append({"segments": segments, **_routes([nodes[i] for i in reversed(path)])})
    return branches


def _routes(path: Sequence[CallNode]) -> dict[str, Any]:
    """The routes of a branch, of each token but the last, in the dtype they are kept in; nothing
    where some reply came without."""
    routes = [node.routed_experts for node in path if node.routed_experts is not None]
    if len(routes) < len(path):
        return {}
    whole = np.concatenate(routes)
    return encoded_routes(whole, whole.dtype.name)


def _segments(node: CallNode, labels: VersionLabels, *, new: bool) -> list[dict[str, Any]]:
    prompt = {"sampled": False, "call": node.call, "token_ids": node.prompt_ids.tolist()}
    output = {
        "sampled": True,
        "new": new,
        "call": node.call,
        "token_ids": node.token_ids.tolist(),
        "logprobs": finite_logprobs(node.logprobs),
        "temperature": node.temperature,
        "logprob_law": node.logprob_law,
        "weight_versions": [
            {"version": labels.text(span.version), "start": span.start, "end": span.end}
            for span in node.spans
        ],
        "finish_reason": node.finish.type,
    }
    return [prompt, output] if len(node.prompt_ids) else [output]
