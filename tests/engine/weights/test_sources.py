"""Safetensors and random sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError, ManifestMismatch, ModelNotFound
from engine.models.locate import locate
from engine.models.weight_files import weight_files
from engine.weights.catalog import Catalog
from engine.weights.load import load
from engine.weights.sources import random, safetensors
from tests.helpers.load_tiny import load_path, poisoned
from tests.helpers.tiny_models import write_tiny


def test_one_file_and_a_folder_of_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "2.safetensors")
    assert [name for name, _ in safetensors.tensors(tmp_path / "1.safetensors")] == ["a"]
    assert [name for name, _ in safetensors.tensors(tmp_path)] == ["a", "b"]


def test_a_name_in_two_shards_is_a_duplicate(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "first.safetensors")
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "second.safetensors")
    with pytest.raises(ManifestMismatch, match=r"model\.norm\.weight came twice"):
        load_path(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", max_shard_size=60_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_path(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", json.dumps({"weight_map": 3})])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / safetensors.INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=safetensors.INDEX_NAME):
        weight_files(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 200, -1000])
def test_a_cut_off_file_is_named(keep: int, tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_path(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        weight_files(tmp_path)
    with pytest.raises(ModelNotFound):
        weight_files(tmp_path / "absent")


def test_random_weights_repeat_by_seed_and_name(tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen2")
    first, again = load_path(tmp_path, "random", seed=3), load_path(tmp_path, "random", seed=3)
    other = load_path(tmp_path, "random", seed=4)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_random_weights_do_not_depend_on_order_or_neighbours(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    index = poisoned(locate(tmp_path).config).weight_index()
    forward = dict(random.tensors(index, 0))
    last = list(index)[-1]
    alone = dict(random.tensors({last: index[last]}, 0))
    assert torch.equal(forward[last], alone[last])


def test_random_weights_have_the_stated_distribution(tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen2", vocab_size=2000)
    model = poisoned(locate(tmp_path).config)
    load(Catalog(model), random.tensors(model.weight_index(), 0))
    assert torch.equal(model.model.norm.weight, torch.ones(64))
    bias = model.model.layers[0].self_attn.qkv_proj.bias
    assert torch.equal(bias, torch.zeros_like(bias))
    assert float(model.lm_head.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(model.lm_head.weight.mean())) < 5e-4
