"""One block of experts, filled from transformers' own module."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from engine.layers.kinds import MoeKind
from engine.layers.moe import MoeBlock
from engine.models.full_names import (
    FusedTensor,
    Target,
    full_tensors,
    fused_tensors,
    second_names,
)
from engine.parallel.mesh import Mesh
from engine.weights.catalog import Catalog
from engine.weights.load import load
from tests.helpers.load_tiny import cpu_runtime

HIDDEN = 64


class OneBlock(nn.Module):
    """`Loadable`: a block alone, called `mlp`."""

    def __init__(self, mlp: MoeBlock) -> None:
        super().__init__()
        self.mlp = mlp

    def weight_index(self) -> dict[str, Target]:
        return full_tensors(self)

    def fused(self) -> dict[str, FusedTensor]:
        return fused_tensors(self)

    def aliases(self) -> Mapping[str, str]:
        return second_names(self)

    def ignored_names(self) -> frozenset[str]:
        return frozenset()


class Routes:
    """A `RouteSink` that keeps what it takes."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, torch.Tensor]] = []

    def take(self, layer_index: int, ids_TK: torch.Tensor) -> None:
        self.taken.append((layer_index, ids_TK.clone()))


def step(num_rows: torch.Tensor | None = None, routes: Routes | None = None) -> Any:
    """What a block asks of a step."""
    return SimpleNamespace(num_rows=num_rows, routes=routes)


def filled_block(
    kind: MoeKind,
    reference: nn.Module,
    mesh: Mesh | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> MoeBlock:
    """The block of one rank, with the weights of a module of transformers."""
    block = MoeBlock(5, HIDDEN, kind, runtime=cpu_runtime(mesh, dtype))
    for parameter in block.parameters():
        parameter.data.fill_(float("nan"))
    tensors = ((f"mlp.{name}", tensor) for name, tensor in reference.state_dict().items())
    load(Catalog(OneBlock(block)), tensors)
    return block


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and bias of choice of a module values that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return module.eval()
