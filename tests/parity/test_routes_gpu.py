"""Routes on a GPU: stored within captured graphs, by drafts too, and read behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from rollout.launch import launch
from tests.helpers.engines import drain
from tests.helpers.exact_routes import check_exact
from tests.helpers.tiny_models import write_tiny
from tests.parity.test_routes import routed
from tests.parity.test_tp_parity import PROMPT

pytestmark = pytest.mark.gpu

DRAFTS = SpeculativeConfig(method="ngram", draft_tokens=3)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    return write_tiny(folder, "qwen3_moe", head_dim=64), folder


@pytest.mark.parametrize("drafts", [SpeculativeConfig(), DRAFTS], ids=["plain", "drafts"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_they_are_those_of_transformers(
    cuda_graphs: bool, drafts: SpeculativeConfig, qwen: tuple[Any, Path]
) -> None:
    model, folder = qwen
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cuda",
        cuda_graphs=cuda_graphs,
        return_routed_experts=True,
        cache=CacheConfig(num_pages=40, page_size=8),
        scheduler=SchedulerConfig(max_running=8, max_step_tokens=64, max_chunk_tokens=24),
        speculative=drafts,
    )
    prompts = [PROMPT[:5] * 4, PROMPT, *[PROMPT[:21]] * 3]
    asked = [
        routed(str(i), prompt, seed=i, max_new_tokens=24 + i) for i, prompt in enumerate(prompts)
    ]
    with launch(config) as replica:
        replica.submit(asked)
        outputs = drain(replica)
    for each in asked:
        check_exact(model, each.prompt_ids.tolist(), outputs[each.rid])
        assert (outputs[each.rid].routed_experts < 8).all() and np.isfinite(
            outputs[each.rid].logprobs
        ).all()
