"""Experts on a GPU: captured steps of batches that do not fill their graphs, eager ones, and
updates, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge import push

pytestmark = pytest.mark.gpu

PROMPT = list(range(5, 60))
SIZES = {"head_dim": 64, "max_position_embeddings": 256}
# No choice of an expert hangs on the last bits of its score.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": SIZES,
    "qwen2_moe": SIZES,
    "mixtral": {**SIZES, "num_experts_per_tok": 3},
    "glm4_moe": SIZES,
}


def probes() -> list:
    """Five rows at once run in a graph of eight."""
    common = {"max_new_tokens": 30}
    return [
        *[request(f"group-{i}", PROMPT, seed=i, group="g", **common) for i in range(3)],
        request("greedy", PROMPT[:31], temperature=0.0, **common),
        request("short", PROMPT[:3], seed=8, **common),
    ]


def assert_exact(model: Any, outputs: dict[str, Any], atol: float) -> None:
    for probe in probes():
        output = outputs[probe.rid]
        want = exact_logprobs(model, probe.prompt_ids.tolist(), output.token_ids.tolist())
        np.testing.assert_allclose(output.logprobs, want, atol=atol, err_msg=probe.rid)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_float32_logprobs_are_those_of_transformers(
    family: str, cuda_graphs: bool, tmp_path: Path
) -> None:
    model = write_tiny(tmp_path, family, **FAMILIES[family])
    new = tiny_hf(family, seed=1, **FAMILIES[family])
    with make_replica(tmp_path, device="cuda", cuda_graphs=cuda_graphs) as replica:
        replica.submit(probes())
        assert_exact(model, drain(replica), 1e-3)
        push(new.cuda(), 1, replica)
        replica.submit(probes())
        assert_exact(new.cpu(), drain(replica), 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logprobs_are_close_to_float32(family: str, tmp_path: Path) -> None:
    """Few rows keep the residual stream in the products of their layers."""
    model = write_tiny(tmp_path, family, **FAMILIES[family])
    with make_replica(tmp_path, device="cuda", dtype="bfloat16") as replica:
        replica.submit(probes())
        outputs = drain(replica)
    for probe in probes():
        output = outputs[probe.rid]
        want = exact_logprobs(model, probe.prompt_ids.tolist(), output.token_ids.tolist())
        # A token that another expert takes in 16 bits is another one's.
        assert np.median(np.abs(output.logprobs - want)) < 0.05, probe.rid
