"""A checkpoint as a trainer wants it: the Hugging Face configuration and the full tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from engine.config import DEFAULT_CONTEXT_LIMIT, LoadFormat
from engine.layers.runtime import LayerRuntime
from engine.models.build import build_model
from engine.models.locate import locate
from engine.weights.open import open_source


@dataclass(frozen=True)
class Checkpoint:
    """hf_config: contents of config.json. tensors: (Hugging Face name, full tensor), once.
    context_length: tokens of a sequence that an engine serves which is given no length of its own.
    num_labels: scores of a sequence classifier; 0 of a model that generates.
    """

    hf_config: dict[str, Any]
    context_length: int
    num_labels: int
    tensors: Iterator[tuple[str, torch.Tensor]]


def read_checkpoint(model: str, load_format: LoadFormat = "auto", seed: int = 0) -> Checkpoint:
    """The very tensors an engine of the same `model`, `load_format`, `seed` loads; what it passes
    over (inverse frequencies in older files) is left out.

    Raises ModelNotFound, CheckpointError or UnknownArchitecture.
    """
    files = locate(model, load_format)
    # Random weights are drawn for the names and shapes of the model; meta tensors have those.
    runtime = LayerRuntime(device=torch.device("meta"), dtype=torch.float32, backend="torch")
    shapes = build_model(files.config, runtime=runtime, max_position=1)
    ignored = shapes.ignored_names()
    source = open_source(files.kind, files.path, shapes, seed)
    return Checkpoint(
        hf_config=files.source,
        context_length=min(files.config.max_position, DEFAULT_CONTEXT_LIMIT),
        num_labels=files.config.num_labels,
        tensors=((name, tensor) for name, tensor in source if name not in ignored),
    )
