"""A mixture of experts is filled from either form of its weights, and written in that of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import CheckpointError
from tests.helpers.expert_families import FAMILIES, WITH_BIAS, tiny_experts
from trainer_bridge.adapters.buffers import sent_buffers
from trainer_bridge.adapters.plain import named_tensors
from trainer_bridge.expert_names import in_file
from trainer_bridge.filling import fill
from trainer_bridge.hf import load_causal_lm

Tensors = dict[str, torch.Tensor]


def in_model(model: Any) -> Tensors:
    return dict(named_tensors(model))


def of_file(model: Any) -> Tensors:
    pairs = named_tensors(model)
    return dict(p for name, t in pairs for p in in_file(name, t, model.config.model_type))


def mixed(model: Any) -> Tensors:
    """Down projections together, everything else as in a file."""
    together = {n: t for n, t in in_model(model).items() if n.endswith(".experts.down_proj")}
    family = model.config.model_type
    apart = {part for n, t in together.items() for part, _ in in_file(n, t, family)}
    return {n: t for n, t in of_file(model).items() if n not in apart} | together


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_files_are_those_that_transformers_writes(family: str, tmp_path: Path) -> None:
    model = tiny_experts(family)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    ours = of_file(model)
    assert written.keys() == ours.keys()
    for name, tensor in written.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("form", [in_model, of_file, mixed])
@pytest.mark.parametrize("family", FAMILIES)
def test_either_form_and_both_fill_a_model(family: str, form: Any, tmp_path: Path) -> None:
    original = tiny_experts(family, seed=1)
    original.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [type(original).__name__]
    model = load_causal_lm(config, reversed(form(original).items()))
    wanted = in_model(original)
    found = in_model(model)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    half = load_causal_lm(config, form(original).items(), dtype=torch.bfloat16)
    biases = dict(sent_buffers(half))
    assert bool(biases) == (family in WITH_BIAS)
    for name, bias in biases.items():
        assert torch.equal(bias, wanted[name]), "it is float32 in a model of bfloat16 too"


def refused(tensors: Tensors) -> CheckpointError:
    with pytest.raises(CheckpointError) as refusal:
        fill(tiny_experts("deepseek_v3"), tensors.items())
    return refusal.value


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("form,name", [(of_file, UP), (in_model, GATE_UP), (of_file, BIAS)])
def test_a_missing_part_is_named(form: Any, name: str) -> None:
    tensors = form(tiny_experts("deepseek_v3"))
    del tensors[name]
    missing = "model.layers.1.mlp.experts.0.gate_proj.weight" if name == GATE_UP else name
    error = refused(tensors)
    assert error.field == missing and "no tensor for" in str(error)


def test_parts_beside_their_whole_are_refused_in_either_order() -> None:
    model = tiny_experts("deepseek_v3")
    whole, part = {GATE_UP: in_model(model)[GATE_UP]}, {UP: of_file(model)[UP]}
    rest = {name: t for name, t in in_model(model).items() if name != GATE_UP}
    for first, second in ((whole, part), (part, whole)):
        error = refused(rest | first | second)
        assert error.field == next(iter(second)) and next(iter(first)) in str(error)


@pytest.mark.parametrize("name", [UP, GATE_UP, BIAS])
def test_a_wrong_shape_is_named(name: str) -> None:
    model = tiny_experts("deepseek_v3")
    tensors = in_model(model) if name == GATE_UP else of_file(model)
    tensors[name] = tensors[name][..., :-1]
    error = refused(tensors)
    assert error.field == name and "has shape" in str(error)


def test_an_expert_too_many_is_named() -> None:
    tensors = of_file(tiny_experts("deepseek_v3"))
    name = UP.replace(".3.", ".8.")
    tensors[name] = tensors[UP]
    assert refused(tensors).field == name
