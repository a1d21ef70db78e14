"""The logprobs of requests that live through an update, against plain forwards of both models."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge import push

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    old = write_tiny(folder, "qwen2", tie_word_embeddings=True)
    return folder, old, tiny_hf("qwen2", seed=1, tie_word_embeddings=True)


def update_midway(replica: InlineReplica, policy: str, new):
    replica.submit([msgspec.structs.replace(request("a", PROMPT, seed=1), kv_policy=policy)])
    for _ in range(6):
        replica.step()
    push(new, 1, replica)
    return drain(replica)["a"]


def gap(model, output, start: int, end: int) -> float:
    """Largest difference to the model's own logprobs of output tokens [start, end)."""
    want = exact_logprobs(model, PROMPT, output.token_ids)
    return float(np.abs(output.logprobs - want)[start:end].max())


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_tokens_keep_their_logprobs_and_only_recomputed_kv_is_the_new_models(
    models, policy: str, overlap: bool
) -> None:
    folder, old, new = models
    with make_replica(folder, overlap=overlap) as replica:
        output = update_midway(replica, policy, new)
    first, second = output.spans
    assert (first.version, second.version) == (0, 1)
    assert gap(old, output, first.start, first.end) < 1e-4
    stale = gap(new, output, second.start, second.end)
    assert stale < 1e-4 if policy == "recompute" else stale > 1e-3
    assert len(output.kv_spans) == (1 if policy == "recompute" else 2)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_fresh_request_is_wholly_of_the_new_model(models, overlap: bool) -> None:
    folder, _, new = models
    with make_replica(folder, overlap=overlap) as replica:
        output = update_midway(replica, "fresh", new)
    assert gap(new, output, 0, len(output.token_ids)) < 1e-4
    assert [span.version for span in (*output.spans, *output.kv_spans)] == [1, 1]
    assert output.num_restarts == 1
