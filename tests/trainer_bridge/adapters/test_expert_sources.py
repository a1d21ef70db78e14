"""Sources of mixtures of experts: fused experts, and buffers that travel in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import expert_ranks as ranks
from tests.helpers.expert_families import WITH_BIAS
from tests.helpers.rank_processes import run_ranks
from tests.trainer_bridge.adapters.test_sharded_sources import check
from trainer_bridge.adapters.buffers import (
    is_sent_buffer,
    keep_buffers,
    restore_buffers,
    sent_buffers,
)
from trainer_bridge.adapters.plain import PlainSource

SIZE = 2


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    return run_ranks(ranks.expert_sources, SIZE, tmp_path_factory.mktemp("experts"))


def wanted(family: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = ranks.model(family)
    return {name: p.detach().to(dtype) for name, p in model.named_parameters()} | dict(
        sent_buffers(model)
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_BIAS)
def test_sharded_experts_are_the_plain_model_and_biases_stay_float32(
    sharded: list[dict[str, Any]], family: str
) -> None:
    check(sharded, f"fsdp {family}", wanted(family))
    check(sharded, f"zero3 {family}", wanted(family, torch.bfloat16))


@pytest.mark.parametrize("family", WITH_BIAS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_plain_source_sends_biases_in_float32(family: str, dtype: torch.dtype | None) -> None:
    model = ranks.model(family)
    source = PlainSource(model, dtype=dtype)
    assert source.lasting == (dtype is None)
    want = wanted(family, dtype or torch.float32)
    found = dict(source.tensors())
    assert list(found) == list(want) and sum(map(is_sent_buffer, found)) == 2
    for spec in source.specs():
        assert torch.equal(found[spec.name], want[spec.name]), spec.name
        assert spec.dtype == str(want[spec.name].dtype).removeprefix("torch.")
    pieces = [piece for piece, _ in source.shards()]
    assert [(p.name, p.dtype) for p in pieces] == [(s.name, s.dtype) for s in source.specs()]


def test_biases_of_a_model_that_was_cast_travel_as_it_computes_with_them() -> None:
    model = ranks.model("deepseek_v3")
    kept = keep_buffers(model)
    source = PlainSource(model.bfloat16())
    assert not source.lasting, "a copy in float32 is sent"
    for name, tensor in source.tensors():
        if is_sent_buffer(name):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, kept[name].bfloat16().float())
            assert not torch.equal(tensor, kept[name]), "there was something to round"
    restore_buffers(model, kept)
    assert PlainSource(model).lasting
    assert all(torch.equal(b, kept[name]) for name, b in sent_buffers(model))
