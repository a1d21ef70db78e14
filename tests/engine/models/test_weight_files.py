"""Which files of a folder are its weights: transformers' order of preference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ManifestMismatch, ModelNotFound
from engine.models.weight_files import INDEX_NAME, weight_files
from tests.helpers.load_tiny import load_path
from tests.helpers.tiny_models import write_tiny

BESIDE = [
    "consolidated.safetensors",
    "consolidated.00.safetensors",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "._model.safetensors",
    "model.safetensors.index.json.bak",
    "README.md",
]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        save_file({"a": torch.ones(1)}, folder / name)


def index(folder: Path, name: str = INDEX_NAME, shard: str = "s-1.safetensors") -> None:
    touch(folder, shard)
    (folder / name).write_text(json.dumps({"weight_map": {"a": shard}}))


def chosen(folder: Path) -> list[str]:
    return [file.name for file in weight_files(folder).files]


@pytest.mark.parametrize("beside", BESIDE)
def test_what_lies_beside_the_weights_changes_nothing(tmp_path: Path, beside: str) -> None:
    write_tiny(tmp_path, "llama")
    plain = load_path(tmp_path)
    (tmp_path / beside).write_bytes(b"not even a safetensors file")
    again = load_path(tmp_path)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


def test_the_order_of_preference(tmp_path: Path) -> None:
    touch(tmp_path, "consolidated.safetensors")
    assert chosen(tmp_path) == ["consolidated.safetensors"], "for want of anything else"
    touch(tmp_path, "b.safetensors", "a.safetensors")
    assert chosen(tmp_path) == ["a.safetensors", "b.safetensors"]
    index(tmp_path, "model.safetensors.index.fp16.json", "v.safetensors")
    assert chosen(tmp_path) == ["v.safetensors"]
    touch(tmp_path, "model.fp16.safetensors")
    assert chosen(tmp_path) == ["model.fp16.safetensors"]
    index(tmp_path)
    assert chosen(tmp_path) == ["s-1.safetensors"]
    touch(tmp_path, "model.safetensors")
    assert chosen(tmp_path) == ["model.safetensors"]


def test_a_file_or_an_index_may_be_named(tmp_path: Path) -> None:
    index(tmp_path)
    touch(tmp_path, "model.safetensors", "other.safetensors")
    assert chosen(tmp_path / "other.safetensors") == ["other.safetensors"]
    assert chosen(tmp_path / INDEX_NAME) == ["s-1.safetensors"]


def test_variants_are_not_guessed_between(tmp_path: Path) -> None:
    touch(tmp_path, "model.fp16.safetensors", "model.bf16.safetensors")
    with pytest.raises(CheckpointError, match=r"bf16\.safetensors, model\.fp16\.safetensors"):
        weight_files(tmp_path)


def test_weights_of_another_format_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"pytorch_model\.bin is not read"):
        weight_files(tmp_path)
    write_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*load_format 'random'"):
        load_path(tmp_path)


def test_a_stray_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "wq": torch.ones(2)}, file)
    with pytest.raises(ManifestMismatch, match=r"wq is no tensor.*model\.safetensors"):
        from tests.helpers.engines import make_replica

        make_replica(tmp_path)
