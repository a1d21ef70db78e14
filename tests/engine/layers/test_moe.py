"""Blocks of experts: transformers' arithmetic of every family, whole, divided among ranks, and with
rows that only fill a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from engine.errors import ModelError
from engine.layers.kinds import MoeKind, NormKind
from engine.layers.moe import MoeBlock
from engine.layers.norm import RMSNorm
from engine.models.config import read_config
from engine.models.deepseek_experts import V3_DEFAULTS, v2_experts, v3_experts
from engine.parallel.mesh import Mesh
from tests.helpers.load_tiny import cpu_runtime
from tests.helpers.moe_blocks import HIDDEN, Routes, filled_block, randomise, step

SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


def _whole_family(name: str) -> Callable[[Any], MoeKind]:
    def kind(config: Any) -> MoeKind:
        source = {**config.to_dict(), "architectures": [f"{name}ForCausalLM"]}
        found = read_config(source).experts
        assert found is not None
        return found

    return kind


def _v3(config: Any) -> MoeKind:
    return v3_experts({**V3_DEFAULTS, **config.to_dict()}, 256)


def _v2(config: Any) -> MoeKind:
    return v2_experts(config.to_dict())


E8 = {"num_experts": 8, "moe_intermediate_size": 32}
N8 = {"n_routed_experts": 8, "moe_intermediate_size": 32}
CASES: dict[str, tuple[Any, Any, Callable[[Any], MoeKind], dict[str, Any]]] = {
    "qwen3": (
        transformers.Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
        _whole_family("Qwen3Moe"),
        {**E8},
    ),
    "qwen3 normalised": (
        transformers.Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
        _whole_family("Qwen3Moe"),
        {**E8, "norm_topk_prob": True, "num_experts_per_tok": 3},
    ),
    "qwen2": (
        transformers.Qwen2MoeConfig,
        Qwen2MoeSparseMoeBlock,
        _whole_family("Qwen2Moe"),
        {**E8, "shared_expert_intermediate_size": 48},
    ),
    "mixtral": (
        transformers.MixtralConfig,
        MixtralSparseMoeBlock,
        _whole_family("Mixtral"),
        {"num_local_experts": 8},
    ),
    "glm4": (
        transformers.Glm4MoeConfig,
        Glm4MoeMoE,
        _whole_family("Glm4Moe"),
        {**N8, "n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 1.5},
    ),
    "deepseek v3": (
        transformers.DeepseekV3Config,
        DeepseekV3MoE,
        _v3,
        {**N8, "n_group": 4, "topk_group": 2},
    ),
    "deepseek v3, not normalised": (
        transformers.DeepseekV3Config,
        DeepseekV3MoE,
        _v3,
        {**N8, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "deepseek v2": (
        transformers.DeepseekV2Config,
        DeepseekV2Moe,
        _v2,
        {**N8, "routed_scaling_factor": 2.0, "norm_topk_prob": True},
    ),
    "deepseek v2, groups": (
        transformers.DeepseekV2Config,
        DeepseekV2Moe,
        _v2,
        {**N8, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1},
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, MoeKind]:
    """The module of transformers, and the kind that its configuration is read as."""
    config_class, block_class, kind_of, sizes = CASES[name]
    config = config_class(**{**SIZES, **sizes})
    config._experts_implementation = "grouped_mm"
    reference = randomise(block_class(config).to(dtype))
    for buffer, value in reference.named_buffers():
        assert value.dtype == dtype, buffer
    return reference, kind_of(config)


def inputs(rows: int = 40, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(3)).to(dtype)


def expected(reference: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = reference(x[None])[0]
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_block_is_that_of_transformers(name: str) -> None:
    reference, kind = make(name)
    x = inputs()
    torch.testing.assert_close(
        filled_block(kind, reference)(x, step()), expected(reference, x), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("divided", ["inner sizes", "experts"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_ranks_add_up(name: str, divided: str, ranks: int) -> None:
    reference, kind = make(name)
    x, total = inputs(), torch.zeros(40, HIDDEN)
    for rank in range(ranks):
        ep_size = ranks if divided == "experts" else 1
        mesh = Mesh(tp_rank=rank, tp_size=ranks, ep_size=ep_size)
        block = filled_block(kind, reference, mesh)
        stored = block.experts.gate_up_proj.weight
        inner = kind.intermediate_size // (1 if ep_size > 1 else ranks)
        assert stored.shape == (8 // ep_size, 2 * inner, HIDDEN)
        # Without other ranks a sum over them is this rank's part.
        total += block(x, step())
    torch.testing.assert_close(total, expected(reference, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_that_of_transformers(name: str) -> None:
    """The rows whose experts no rounding decides differ by rounding alone."""
    reference, kind = make(name, torch.float32)
    block = filled_block(kind, reference, dtype=torch.bfloat16)
    x = inputs(200, torch.bfloat16)
    keeps = {name for name, _ in reference.named_buffers()}
    for leaf, parameter in reference.named_parameters():
        if leaf not in keeps:
            parameter.data = parameter.data.bfloat16()
    got, want = block(x, step()), expected(reference, x)
    assert got.dtype == want.dtype == torch.bfloat16
    difference = (got.float() - want.float()).abs().amax(-1) / want.float().abs().amax(-1)
    assert (difference < 0.02).float().mean() > 0.95


@pytest.mark.parametrize("name", ["glm4", "deepseek v3"])
def test_a_bias_chooses_and_weighs_nothing(name: str) -> None:
    reference, kind = make(name)
    block, x = filled_block(kind, reference), inputs()
    bias = block.gate.e_score_correction_bias
    assert bias is not None and bias.dtype == torch.float32
    before = block.gate(x, None)
    bias.data += 7.0
    same = block.gate(x, None)
    assert torch.equal(before.ids_TK, same.ids_TK)
    assert torch.equal(before.weights_TK, same.weights_TK)
    bias.data[3] += 7.0
    chosen = block.gate(x, None)
    assert (chosen.ids_TK == 3).any(-1).all()
    assert not torch.equal(before.ids_TK, chosen.ids_TK)
    # A token that went there before has the weights that it had.
    kept = (chosen.ids_TK.sort().values == before.ids_TK.sort().values).all(-1)
    assert kept.any()
    torch.testing.assert_close(
        chosen.weights_TK[kept].sort().values, before.weights_TK[kept].sort().values
    )


def test_a_bias_stays_float32_in_a_model_of_16_bits() -> None:
    reference, kind = make("glm4")
    block = filled_block(kind, reference, dtype=torch.bfloat16)
    stored = block.gate.e_score_correction_bias
    assert stored is not None
    assert torch.equal(stored, reference.state_dict()["gate.e_score_correction_bias"])
    assert block.gate.weight.dtype == torch.bfloat16


def test_rows_that_fill_a_graph_go_to_no_expert() -> None:
    reference, kind = make("qwen2")
    block, x = filled_block(kind, reference), inputs(8)
    want, routes = block(x[:5], step()), Routes()
    x[5:] = float("nan")
    got = block(x, step(torch.tensor([5], dtype=torch.int32), routes))
    # Products of eight rows may order their sums as those of five do not.
    torch.testing.assert_close(got[:5], want)
    ((layer, ids_TK),) = routes.taken
    assert layer == 5
    assert ids_TK.dtype == torch.int32
    assert (ids_TK[5:] == -1).all()
    assert ((ids_TK[:5] >= 0) & (ids_TK[:5] < 8)).all()


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "glm4"])
def test_few_rows_add_to_the_stream_what_many_do(name: str) -> None:
    reference, kind = make(name)
    block, total = filled_block(kind, reference), inputs(4)
    norm = RMSNorm(HIDDEN, NormKind(eps=1e-6), runtime=cpu_runtime())
    norm.weight.place(torch.randn(HIDDEN))
    got = block.add_to(total, norm, step())
    torch.testing.assert_close(got, total + block(norm(total), step()))


@pytest.mark.parametrize(
    ("name", "changes", "ep_size", "field"),
    [
        ("qwen2", {"num_experts": 7}, 2, "num_experts"),
        ("mixtral", {"num_experts": 7}, 2, "num_local_experts"),
        ("glm4", {"num_experts": 7}, 2, "n_routed_experts"),
        ("qwen3", {"intermediate_size": 31}, 1, "moe_intermediate_size"),
        ("mixtral", {"intermediate_size": 31}, 1, "intermediate_size"),
        ("qwen2", {"shared": 47}, 2, "shared_expert_intermediate_size"),
    ],
)
def test_what_ranks_do_not_divide_is_named(
    name: str, changes: dict[str, int], ep_size: int, field: str
) -> None:
    _, kind = make(name)
    if "num_experts" in changes:
        kind = replace(kind, routing=replace(kind.routing, **changes))
    elif "intermediate_size" in changes:
        kind = replace(kind, **changes)
    else:
        assert kind.shared is not None
        mlp = replace(kind.shared.mlp, intermediate_size=changes["shared"])
        kind = replace(kind, shared=replace(kind.shared, mlp=mlp))
    mesh = Mesh(tp_rank=1, tp_size=2, ep_size=ep_size)
    with pytest.raises(ModelError, match="2 ranks do not divide") as caught:
        MoeBlock(0, HIDDEN, kind, runtime=cpu_runtime(mesh))
    assert caught.value.field == field
