"""What the ranks of a tensor-parallel group hold and compute adds up to the whole.

There is no communication here: ranks are built one after another in this process and their
summands added by the test.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.layers.embedding import LMHead, VocabEmbedding
from engine.layers.kinds import DenseMLPKind
from engine.layers.linear import MergedLinear, RowLinear, gate_up_outputs
from engine.layers.mlp import GatedMLP
from engine.layers.parameter import Part
from engine.models.build import build_model
from engine.models.locate import locate
from engine.parallel.mesh import Mesh
from engine.weights.catalog import Catalog
from engine.weights.load import load
from engine.weights.sources import safetensors
from tests.helpers.load_tiny import cpu_runtime
from tests.helpers.tiny_models import write_tiny
from tests.helpers.weight_engines import slice_of


def meshes(tp_size: int) -> list[Mesh]:
    return [Mesh(tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]


def test_row_linear_summands_add_up_with_the_bias_once() -> None:
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(5, 8)
    total = torch.zeros(5, 6)
    for mesh in meshes(4):
        layer = RowLinear(8, 6, bias=True, runtime=cpu_runtime(mesh), what="in")
        layer.weight.place(weight)
        assert layer.bias is not None
        layer.bias.place(bias)
        total += layer(x[:, mesh.tp_rank * 2 : mesh.tp_rank * 2 + 2])
    torch.testing.assert_close(total, x @ weight.T + bias)


def test_merged_linear_columns_are_those_of_the_ranks() -> None:
    gate, up, x = torch.randn(8, 3), torch.randn(8, 3), torch.randn(5, 3)
    gates, ups = [], []
    for mesh in meshes(2):
        outputs = gate_up_outputs(8, mesh)
        layer = MergedLinear(3, outputs, bias=False, runtime=cpu_runtime(mesh))
        layer.weight.place(gate, "gate_proj")
        layer.weight.place(up, "up_proj")
        own_gate, own_up = layer(x).split(layer.sizes, dim=-1)
        gates.append(own_gate)
        ups.append(own_up)
    torch.testing.assert_close(torch.cat(gates, -1), x @ gate.T)
    torch.testing.assert_close(torch.cat(ups, -1), x @ up.T)


def test_mlp_summands_add_up() -> None:
    tensors = {
        "gate": torch.randn(8, 4),
        "up": torch.randn(8, 4),
        "down": torch.randn(4, 8),
    }
    x = torch.randn(5, 4)
    total = torch.zeros(5, 4)
    for mesh in meshes(4):
        mlp = GatedMLP(4, DenseMLPKind(intermediate_size=8), runtime=cpu_runtime(mesh))
        mlp.gate_up_proj.weight.place(tensors["gate"], "gate_proj")
        mlp.gate_up_proj.weight.place(tensors["up"], "up_proj")
        mlp.down_proj.weight.place(tensors["down"])
        total += mlp(x)
    hidden = torch.nn.functional.silu(x @ tensors["gate"].T) * (x @ tensors["up"].T)
    torch.testing.assert_close(total, hidden @ tensors["down"].T)


def test_embedding_summands_and_head_columns_of_an_odd_vocabulary() -> None:
    table, ids = torch.randn(63, 4), torch.tensor([0, 62, 31, 32, 7])
    hidden = torch.randn(5, 4)
    total, logits = torch.zeros(5, 4), []
    for mesh in meshes(4):
        runtime = cpu_runtime(mesh)
        embedding = VocabEmbedding(63, 4, runtime=runtime)
        embedding.weight.place(table)
        total += embedding(ids)
        logits.append(LMHead(63, 4, runtime=runtime, tied_to=embedding)(hidden))
    assert torch.equal(total, table[ids])
    torch.testing.assert_close(torch.cat(logits, -1), hidden @ table.T)


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma3"])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_slices_of_a_whole_model_reassemble_every_full_tensor(
    tp_size: int, family: str, tmp_path: Path
) -> None:
    """With 4 ranks and 2 KV heads, ranks share heads: every element is held at least once."""
    reference = write_tiny(tmp_path, family, attention_bias=True, tie_word_embeddings=False)
    reference = reference.state_dict()
    config = locate(tmp_path).config
    rebuilt = {name: torch.full_like(full, float("nan")) for name, full in reference.items()}
    for mesh in meshes(tp_size):
        model = build_model(config, runtime=cpu_runtime(mesh))
        load(Catalog(model), safetensors.tensors(tmp_path))
        for name, (parameter, key) in model.weight_index().items():
            slice_of(parameter.parts[key], rebuilt[name]).copy_(parameter.views(key)[0])
    for name, full in reference.items():
        assert torch.equal(rebuilt[name], full), name


def test_each_rank_attends_with_the_kv_heads_of_its_query_heads(tmp_path: Path) -> None:
    """Query head h of the model uses KV head h // (H / K), on whichever rank h lives."""
    write_tiny(tmp_path, "llama")
    config = locate(tmp_path).config
    for mesh in meshes(4):
        model = build_model(config, runtime=cpu_runtime(mesh))
        index = model.weight_index()
        parameter, key = index["model.layers.0.self_attn.q_proj.weight"]
        query_head = first_row(parameter.parts[key]) // config.head_dim
        parameter, key = index["model.layers.0.self_attn.k_proj.weight"]
        assert first_row(parameter.parts[key]) // config.head_dim == query_head // 2


def first_row(part: Part) -> int:
    (piece,) = part.pieces
    assert isinstance(piece.source[0], slice)
    return piece.source[0].start
