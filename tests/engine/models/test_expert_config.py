"""config.json dicts of models with experts: what they mean, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.allocation import num_parameters
from engine.config import SchedulerConfig
from engine.errors import CheckpointError, ManifestMismatch, ModelError, UnknownArchitecture
from engine.layers.kinds import DenseMLPKind, MoeKind
from engine.layers.runtime import LayerRuntime
from engine.memory import StepSizes, step_bytes
from engine.models.build import build_model
from engine.models.config import read_config
from engine.models.deepseek_experts import V3_DEFAULTS, v2_experts, v3_experts
from engine.models.locate import locate
from engine.weights.catalog import Catalog
from engine.weights.load import load
from engine.weights.open import open_source
from tests.engine.models.test_model_config import with_
from tests.helpers.load_tiny import load_path, poisoned
from tests.helpers.tiny_models import write_tiny, write_tiny_gguf

ROOT = Path(__file__).parents[3]
QWEN3 = with_(architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=6)
QWEN2 = with_(architectures=["Qwen2MoeForCausalLM"], num_hidden_layers=6)
MIXTRAL = with_(architectures=["MixtralForCausalLM"])
GLM4 = with_(architectures=["Glm4MoeForCausalLM"], num_hidden_layers=6)


def experts_of(source: dict[str, Any]) -> MoeKind:
    found = read_config(source).experts
    assert found is not None
    return found


def sparse(source: dict[str, Any]) -> list[bool]:
    return [isinstance(layer.mlp, MoeKind) for layer in read_config(source).layers]


def test_what_a_file_leaves_out_of_qwen3() -> None:
    kind = experts_of(QWEN3)
    assert (kind.routing.num_experts, kind.routing.top_k, kind.intermediate_size) == (128, 8, 768)
    # Files of the models that are served have it on; without it weights are no shares of one.
    assert not kind.routing.normalised
    assert kind.routing.rounded_weights and not kind.routing.wide_logits
    assert kind.shared is None


def test_which_layers_have_experts() -> None:
    assert sparse(QWEN3) == [True] * 6
    assert sparse({**QWEN3, "decoder_sparse_step": 2}) == [False, True] * 3
    assert sparse({**QWEN2, "mlp_only_layers": [0, 5]}) == [False, *[True] * 4, False]
    assert sparse({**QWEN2, "num_experts": 0}) == [False] * 6
    assert sparse(GLM4) == [False, *[True] * 5]
    assert sparse({**GLM4, "first_k_dense_replace": 0}) == [True] * 6
    assert sparse(MIXTRAL) == [True] * 2
    dense = read_config({**QWEN2, "mlp_only_layers": [0]}).layers[0].mlp
    assert dense == DenseMLPKind(intermediate_size=96)


def test_experts_that_are_shared() -> None:
    gated = experts_of({**QWEN2, "shared_expert_intermediate_size": 40}).shared
    assert gated is not None and gated.gated
    assert (gated.name, gated.mlp.intermediate_size) == ("shared_expert", 40)
    plain = experts_of({**GLM4, "n_shared_experts": 2, "moe_intermediate_size": 24}).shared
    assert plain is not None and not plain.gated
    assert (plain.name, plain.mlp.intermediate_size) == ("shared_experts", 48)


@pytest.mark.parametrize(
    ("source", "changes", "field"),
    [
        (QWEN3, {"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok"),
        (QWEN3, {"num_experts": 8, "num_local_experts": 16}, "num_experts"),
        (QWEN3, {"norm_topk_prob": 1}, "norm_topk_prob"),
        (QWEN3, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN2, {"mlp_only_layers": [True]}, "mlp_only_layers"),
        (QWEN2, {"mlp_only_layers": 3}, "mlp_only_layers"),
        (MIXTRAL, {"num_local_experts": 0}, "num_experts_per_tok"),
        (GLM4, {"n_routed_experts": 10, "n_group": 4}, "n_group"),
        (GLM4, {"n_routed_experts": 8, "n_group": 8}, "n_group"),
        (GLM4, {"n_routed_experts": 16, "n_group": 4, "topk_group": 5}, "topk_group"),
        (GLM4, {"n_routed_experts": 16, "n_group": 8, "topk_group": 3}, "topk_group"),
        (GLM4, {"routed_scaling_factor": 0}, "routed_scaling_factor"),
        (GLM4, {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ],
)
def test_numbers_that_do_not_go_together_are_named(
    source: dict[str, Any], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(CheckpointError, match=field) as caught:
        read_config({**source, **changes})
    assert caught.value.field == field


def test_heads_turn_by_pairs_in_part_too() -> None:
    rope = read_config({**GLM4, "head_dim": 32}).layers[0].attention.rope
    assert rope is not None and rope.num_turned(32) == 16
    with pytest.raises(UnknownArchitecture, match="15 of a head_dim of 30") as caught:
        read_config({**GLM4, "head_dim": 30})
    assert caught.value.field == "head_dim"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("DeepseekV2ForCausalLM", "MLA"),
        ("DeepseekV3ForCausalLM", "MLA"),
        ("GptOssForCausalLM", "sinks"),
        ("OlmoeForCausalLM", "clip_qkv"),
    ],
)
def test_architectures_that_are_not_built_say_what_is_missing(name: str, missing: str) -> None:
    with pytest.raises(UnknownArchitecture, match=rf"'{name}'.*{missing}") as caught:
        read_config(with_(architectures=[name]))
    assert caught.value.field == "architectures"


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_experts_of_a_dense_family_are_refused(key: str) -> None:
    with pytest.raises(UnknownArchitecture, match=key) as caught:
        read_config(with_(**{key: 8}))
    assert caught.value.field == key


def test_a_method_of_choice_that_is_unknown_is_refused() -> None:
    source = {"num_experts_per_tok": 2, "topk_method": "noaux_tc"}
    with pytest.raises(UnknownArchitecture, match="'noaux_tc'") as caught:
        v2_experts(source)
    assert caught.value.field == "topk_method"


def test_groups_of_one_are_none() -> None:
    """What a group is then would be all experts."""
    assert experts_of(GLM4).routing.group_score == "none"
    assert v3_experts(dict(V3_DEFAULTS), 256).routing.group_score == "top2_sum"


def test_gguf_files_with_experts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mixtral.gguf"
    write_tiny_gguf(path, "llama", metadata={"expert_count": 8.0})
    with pytest.raises(ModelError, match="expert_count"):
        locate(path)


def test_layers_behind_the_last_are_passed_over_where_transformers_does(tmp_path: Path) -> None:
    """GLM-4.5-Air has 46 layers, and one more that predicts a token further ahead."""
    write_tiny(tmp_path, "glm4_moe")
    files = locate(tmp_path)
    model = poisoned(files.config)
    source = dict(open_source(files.kind, files.path, model, 0))
    extra = {"model.layers.46.eh_proj.weight": torch.zeros(3), "model.layers.92.x": torch.ones(1)}
    report = load(Catalog(model), {**source, **extra}.items())
    assert report.num_tensors == len(source)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    with pytest.raises(ManifestMismatch) as caught:
        load(Catalog(model), {**source, "model.layers.45.x": torch.zeros(1)}.items())
    assert caught.value.field == "model.layers.45.x"
    config = json.loads((tmp_path / "config.json").read_text())
    long = poisoned(read_config({**config, "num_hidden_layers": 47}))
    with pytest.raises(ManifestMismatch) as caught:
        Catalog(long).check("model.layers.46.eh_proj.weight", (3,))
    assert caught.value.field == "model.layers.46.eh_proj.weight"


def test_random_weights_are_drawn_for_each_expert(tmp_path: Path) -> None:
    write_tiny(tmp_path, "glm4_moe")
    model = load_path(tmp_path, "random", seed=3)
    gate_up = model.model.layers[2].mlp.experts.gate_up_proj.weight
    assert len({float(matrix.sum()) for matrix in gate_up}) == 8
    assert float(gate_up.std()) == pytest.approx(0.02, rel=0.05)
    # As transformers begins: no expert is chosen for its bias.
    assert not model.model.layers[2].mlp.gate.e_score_correction_bias.any()


def test_a_model_of_30_billion_has_as_many_weights_as_its_files() -> None:
    """A name for each of 128 experts' matrices in 48 layers, and for all of a layer together."""
    files = locate(ROOT / "benchmarks/shapes/qwen3-30b-a3b.json", "random")
    nowhere = LayerRuntime(device=torch.device("meta"), dtype=torch.bfloat16, backend="torch")
    model = build_model(files.config, runtime=nowhere, max_position=1)
    assert num_parameters(model) == 30_532_122_624
    assert len(model.weight_index()) == 3 + 48 * (2 + 4 + 2 + 1 + 128 * 3)
    assert len(model.fused()) == 48 * 2


def test_memory_is_kept_free_for_what_goes_through_experts() -> None:
    dense = StepSizes(hidden_size=64, intermediate_size=96, outputs=100)
    moe = StepSizes.of(
        read_config({**QWEN3, "num_experts_per_tok": 8, "moe_intermediate_size": 32})
    )
    assert moe == StepSizes(
        hidden_size=64, intermediate_size=96, outputs=100, experts_size=8 * (32 + 64)
    )
    scheduler = SchedulerConfig(max_step_tokens=1000)
    more = step_bytes(scheduler, 8, moe) - step_bytes(scheduler, 8, dense)
    assert more == 1000 * 8 * (32 + 64) * 2
