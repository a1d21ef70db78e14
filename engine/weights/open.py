"""From a kind of files to the tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from engine.weights.catalog import Loadable
from engine.weights.sources import gguf, random, safetensors


def open_source(
    kind: Literal["safetensors", "gguf", "random"], path: Path, model: Loadable, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, full tensor) pairs of the weights at `path`.

    kind 'random' reads nothing and draws for the tensors of `model` from `seed`.
    """
    if kind == "gguf":
        return gguf.tensors(path)
    if kind == "safetensors":
        return safetensors.tensors(path)
    return random.tensors(model.weight_index(), seed)


def origin_of(
    kind: Literal["safetensors", "gguf", "random"], path: Path
) -> Callable[[str], Path | str]:
    """Tells the file that a tensor came from, for an error that names it."""
    if kind == "safetensors":
        return lambda name: safetensors.open_listing(path).file_of(name)
    return lambda _name: "random weights" if kind == "random" else path
