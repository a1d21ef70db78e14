"""Routers are found, and weigh their own choice as their class does."""

from __future__ import annotations

import pytest
import torch

from recipes.trainers.routers import routers_of
from tests.helpers.expert_families import FAMILIES, tiny_experts
from tests.helpers.tiny_models import tiny_hf

DENSE = {"qwen3_moe": [1], "mixtral": [], "olmoe": []}
"""Layers without experts; the first in the other families."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_routers_own_choice_weighs_what_its_class_says(family: str, dtype: torch.dtype) -> None:
    model = tiny_experts(family).to(dtype)
    routers = routers_of(model)
    dense = DENSE.get(family, [0])
    assert [router.layer for router in routers] == [i for i in range(3) if i not in dense]
    for router in routers:
        hidden_TH = torch.randn(1, 40, 64, dtype=dtype)
        logits_TE, weights_TK, ids_TK = router.module(hidden_TH)
        found_TK = router.weigh(router.module, logits_TE, ids_TK)
        assert found_TK.dtype == weights_TK.dtype
        torch.testing.assert_close(found_TK, weights_TK, atol=0, rtol=0)
        shares_TE = router.shares(logits_TE)
        assert shares_TE.dtype == torch.float32 and bool((shares_TE >= 0).all())
        torch.testing.assert_close(shares_TE.sum(-1), torch.ones(40))


def test_a_dense_model_has_none() -> None:
    assert routers_of(tiny_hf("qwen3")) == []
