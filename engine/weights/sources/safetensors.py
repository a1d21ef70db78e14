"""Tensors of safetensors files: one file, a folder of them, or an indexed set of shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError, ModelNotFound

INDEX_NAME = "model.safetensors.index.json"


def files(path: Path) -> list[Path]:
    """The files that hold the weights at `path`, sorted.

    An index names its shards; without one a folder gives all its *.safetensors files.
    Raises ModelNotFound for nothing there, CheckpointError for a shard that is missing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ModelNotFound(f"no safetensors file or folder at {path}", field="path")
    index = path / INDEX_NAME
    if index.exists():
        return _shards(index)
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise ModelNotFound(f"no *.safetensors file in {path}", field="path")
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of safetensors: {error}", field="path"
        ) from None
    shards = sorted({index.parent / name for name in names})
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(
                f"{index.name} names {shard.name}, which is missing", field="path"
            )
    return shards


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) pairs of every file at `path`.

    Raises CheckpointError, naming the file, when one cannot be read.
    """
    for file in files(path):
        try:
            with safe_open(str(file), framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - the reader is not a mapping
                    yield name, reader.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read: {error}", field="path") from error
