"""Find a model on disk: what kind of files it has, and what it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config import LoadFormat
from engine.errors import CheckpointError, ModelError, ModelNotFound
from engine.models.config import ModelConfig, read_config
from engine.models.gguf_config import gguf_config, gguf_key
from engine.models.gguf_file import GGUFFile
from engine.models.weight_files import (
    exists,
    is_folder,
    read_small,
    require_file,
    shown,
    weight_files,
)

FileKind = Literal["safetensors", "gguf", "random"]


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk.

    kind: where its weights come from. path: the folder or file that holds them.
    config: what the model is; `source` is the config.json dict it was read from.
    """

    kind: FileKind
    path: Path
    config: ModelConfig
    source: dict[str, Any]


def locate(model: str | Path, load_format: LoadFormat = "auto") -> ModelFiles:
    """The model at a path: a Hugging Face folder, a GGUF file, or a config.json.

    Raises ModelNotFound when nothing is there, CheckpointError when what is there does not
    fit `load_format` or cannot be read, UnknownArchitecture when it is not served.
    """
    path = Path(model).expanduser()
    if not exists(path):
        raise ModelNotFound(
            f"no model at {shown(path)}: give a Hugging Face folder, a .gguf file, or a "
            "config.json",
            field="model",
        )
    if is_folder(path):
        path = _inside(path)
    require_file(path)
    if path.suffix == ".gguf":
        return _gguf(path, load_format)
    if path.suffix == ".json":
        return _hugging_face(path, load_format)
    raise CheckpointError(f"{path} is neither a .gguf file nor a config.json", field="model")


def _inside(folder: Path) -> Path:
    """The file that describes the model in a folder: its config.json, or its only GGUF."""
    config = folder / "config.json"
    if config.exists():
        return config
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder} has several models, name one: {names}", field="model")
    raise ModelNotFound(f"{folder} has neither a config.json nor a .gguf file", field="model")


def _gguf(path: Path, load_format: LoadFormat) -> ModelFiles:
    if load_format == "safetensors":
        raise CheckpointError(f"load_format 'safetensors', but {path} is GGUF", field="load_format")
    file = GGUFFile(path)
    source = gguf_config(file)
    kind: FileKind = "random" if load_format == "random" else "gguf"
    try:
        config = read_config(source)
    except ModelError as error:
        # Say it in the file's own words.
        key = gguf_key(str(file.metadata["general.architecture"]), error.field)
        raise type(error)(f"{path}: {key}: {error.message}", field=key) from None
    return ModelFiles(kind, path, config, source)


def _hugging_face(config: Path, load_format: LoadFormat) -> ModelFiles:
    if load_format == "gguf":
        raise CheckpointError(
            f"load_format 'gguf', but {config} is a Hugging Face model", field="load_format"
        )
    source = _read_json(config)
    generation_file = config.parent / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else None
    model_config = read_config(source, generation)
    if load_format == "random":
        return ModelFiles("random", config.parent, model_config, source)
    try:
        weight_files(config.parent)
    except ModelNotFound as error:
        raise CheckpointError(
            f"{error.message}; use load_format 'random' to run without weights",
            field="load_format",
        ) from error
    return ModelFiles("safetensors", config.parent, model_config, source)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_small(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", field=path.name) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", field=path.name)
    return value
