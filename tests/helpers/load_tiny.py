"""Build and load the engine's model from files, as a worker does."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import LoadFormat
from engine.layers.runtime import LayerRuntime
from engine.models.build import build_model
from engine.models.config import ModelConfig
from engine.models.decoder import CausalLM
from engine.models.locate import locate
from engine.parallel.mesh import Mesh
from engine.weights.catalog import Catalog
from engine.weights.load import load
from engine.weights.open import open_source


def cpu_runtime(mesh: Mesh | None = None, dtype: torch.dtype = torch.float32) -> LayerRuntime:
    """Layers on the CPU with the reference kernels."""
    return LayerRuntime(
        device=torch.device("cpu"), dtype=dtype, backend="torch", mesh=mesh or Mesh()
    )


def poisoned(
    config: ModelConfig, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32
) -> CausalLM:
    """A model whose every weight is NaN: what a loader misses shows in the logits."""
    model = build_model(config, runtime=cpu_runtime(mesh, dtype))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def load_path(
    path: Path,
    load_format: LoadFormat = "auto",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> CausalLM:
    """The model at `path` with its weights."""
    files = locate(path, load_format)
    model = poisoned(files.config, dtype=dtype)
    load(Catalog(model), open_source(files.kind, files.path, model, seed))
    return model
