"""Loading: every name once, in place, and errors that name the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ManifestMismatch
from engine.models.decoder import CausalLM
from engine.models.locate import locate
from engine.weights.catalog import Catalog
from engine.weights.load import load
from tests.helpers.dense_context import dense_logits
from tests.helpers.load_tiny import poisoned
from tests.helpers.tiny_models import tiny_hf, write_tiny

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def setup(path: Path, **overrides: Any) -> tuple[CausalLM, dict[str, torch.Tensor]]:
    reference = write_tiny(path, "llama", **overrides)
    return poisoned(locate(path).config), dict(reference.state_dict())


def test_every_tensor_in_any_order_and_dtype(tmp_path: Path) -> None:
    model, state = setup(tmp_path)
    report = load(Catalog(model), ((name, state[name].double()) for name in sorted(state)))
    assert report.num_tensors == len(state)
    assert report.num_bytes == sum(tensor.numel() * 4 for tensor in state.values())
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_a_second_load_changes_the_model_in_place(tmp_path: Path) -> None:
    model, state = setup(tmp_path)
    load(Catalog(model), state.items())
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    ids_T = torch.arange(20)
    other = tiny_hf("llama", seed=5)
    load(Catalog(model), other.state_dict().items())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
    with torch.inference_mode():
        expected_TV = other(ids_T[None]).logits[0]
    torch.testing.assert_close(dense_logits(model, ids_T), expected_TV, rtol=0, atol=1e-4)


def test_tensors_of_an_autograd_graph_leave_none_behind(tmp_path: Path) -> None:
    model, state = setup(tmp_path)
    catalog = Catalog(model)
    load(catalog, ((name, (tensor * 1).requires_grad_()) for name, tensor in state.items()))
    assert not any(view.requires_grad for name in catalog.names for view in catalog.views(name))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_index_names_what_transformers_names(tmp_path: Path) -> None:
    model, state = setup(tmp_path, attention_bias=True, mlp_bias=True)
    assert set(model.weight_index()) == set(state)


def test_an_unknown_name_fails(tmp_path: Path) -> None:
    model, state = setup(tmp_path)
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(96, 64)
    with pytest.raises(ManifestMismatch, match=r"layers\.9.*no tensor of this model") as caught:
        load(Catalog(model), state.items())
    assert caught.value.field == "model.layers.9.mlp.up_proj.weight"


def test_a_missing_name_fails_unless_partial(tmp_path: Path) -> None:
    model, state = setup(tmp_path)
    del state[Q_PROJ]
    with pytest.raises(ManifestMismatch, match="did not come") as caught:
        load(Catalog(model), state.items())
    assert caught.value.field == Q_PROJ
    report = load(Catalog(model), {EMBED: state[EMBED]}.items(), partial=True)
    assert report.num_tensors == 1


def test_a_duplicate_fails(tmp_path: Path) -> None:
    model, state = setup(tmp_path)

    def twice() -> Iterator[tuple[str, torch.Tensor]]:
        yield Q_PROJ, state[Q_PROJ]
        yield Q_PROJ, state[Q_PROJ]

    with pytest.raises(ManifestMismatch, match="came twice") as caught:
        load(Catalog(model), twice())
    assert caught.value.field == Q_PROJ


def test_a_wrong_shape_fails(tmp_path: Path) -> None:
    model, state = setup(tmp_path)
    state[Q_PROJ] = torch.zeros(64, 63)
    with pytest.raises(ManifestMismatch, match=r"\[64, 63\].*\[64, 64\]") as caught:
        load(Catalog(model), state.items())
    assert caught.value.field == Q_PROJ


@pytest.mark.parametrize("names", [[EMBED], [HEAD], [EMBED, HEAD], [HEAD, EMBED]])
def test_a_tied_tensor_comes_under_either_name_or_both(names: list[str], tmp_path: Path) -> None:
    model, state = setup(tmp_path, tie_word_embeddings=True)
    tied = state.pop(EMBED)
    state.pop(HEAD, None)
    report = load(Catalog(model), [*state.items(), *((name, tied) for name in names)])
    assert report.num_tensors == len(state) + 1
    assert torch.equal(model.lm_head.weight, tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_names_with_different_values_fail(tmp_path: Path) -> None:
    model, state = setup(tmp_path, tie_word_embeddings=True)
    state[EMBED] = state.pop(EMBED)
    state.pop(HEAD, None)
    state[HEAD] = state[EMBED] + 1
    with pytest.raises(ManifestMismatch, match="ties") as caught:
        load(Catalog(model), state.items())
    assert caught.value.field == HEAD


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    model, state = setup(tmp_path)
    num_tensors = len(state)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    assert load(Catalog(model), state.items()).num_tensors == num_tensors
    state["model.layers.7.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    with pytest.raises(ManifestMismatch, match=r"layers\.7"):
        load(Catalog(model), state.items())
