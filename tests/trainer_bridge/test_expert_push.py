"""A transformers model with experts is published to an engine whose ranks divide them: what is
served then is what the trainer computes, whatever carries it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import ChecksumMismatch, ManifestMismatch
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, exact_logprobs, request
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.parity.test_tp_parity import PROMPT, config_of
from trainer_bridge.adapters.fitting import source_of
from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.stored import check_stored

FAMILIES: dict[str, dict[str, Any]] = {"glm4_moe": {}, "mixtral": {"num_experts_per_tok": 3}}


@pytest.fixture(scope="module", params=list(FAMILIES))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, InlineReplica]]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tiny(folder, request.param, **FAMILIES[request.param])
    config = config_of(folder, 2)
    config = replace(config, parallel=replace(config.parallel, ep=True))
    with InlineReplica(config, ThreadedExecutor(config)) as replica:
        yield request.param, replica


def assert_serves(replica: InlineReplica, model: Any) -> None:
    replica.submit([request("r", PROMPT, temperature=0.0, max_new_tokens=6)])
    output = drain(replica)["r"]
    want = exact_logprobs(model, PROMPT, output.token_ids.tolist())
    np.testing.assert_allclose(output.logprobs, want, atol=1e-4)


@pytest.mark.parametrize("transport", ["inproc", "disk", "delta", "nccl", "cuda_ipc"])
def test_what_is_served_is_what_the_trainer_computes(
    transport: str, served: tuple[str, InlineReplica]
) -> None:
    family, replica = served
    model = tiny_hf(family, seed=len(transport), **FAMILIES[family])
    options = PushOptions(transport=transport, checksums=True, stored=True, timeout_s=60.0)  # type: ignore[arg-type]
    version = replica.state().version
    with Publisher(model, [replica], options) as publisher:
        publisher.push(version + 1)
        assert_serves(replica, model)
        with torch.no_grad():
            # One expert learned, and the router's bias moved, where there is one.
            layer = model.model.layers[2].mlp
            layer.experts.gate_up_proj[5] *= 1.5
            if family == "glm4_moe":
                layer.gate.e_score_correction_bias += torch.linspace(0, 0.5, 8)
        publisher.push(version + 2)
        assert_serves(replica, model)


def test_a_model_of_another_number_of_experts_is_refused(
    served: tuple[str, InlineReplica],
) -> None:
    family, replica = served
    key = "n_routed_experts" if family == "glm4_moe" else "num_local_experts"
    other = tiny_hf(family, **{**FAMILIES[family], key: 16})
    version = replica.state().version
    with (
        Publisher(other, [replica], PushOptions()) as publisher,
        pytest.raises(ManifestMismatch) as caught,
    ):
        publisher.push(version + 1)
    assert caught.value.field.startswith("model.layers.")
    assert "16" in caught.value.message
    assert replica.state().version == version


def test_what_an_engine_stores_of_one_expert_is_compared(
    served: tuple[str, InlineReplica],
) -> None:
    """One element of an expert that is not what the trainer has is told by its name."""
    family, replica = served
    model = tiny_hf(family, seed=31, **FAMILIES[family])
    ranks = replica._leader._executor._ranks  # type: ignore[attr-defined]
    version = replica.state().version
    with Publisher(model, [replica], PushOptions(stored=True)) as publisher:
        publisher.push(version + 1)
        moe = ranks[0]._worker._model.model.layers[2].mlp.experts
        moe.down_proj.weight.data[1, 0, 0] += 1
        with pytest.raises(ChecksumMismatch, match="rank 0 stores") as caught:
            check_stored(source_of(model), replica)
    assert ".experts.1." in caught.value.field
