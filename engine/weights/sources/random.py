"""Random weights that depend on the seed and each tensor's name, on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch

from engine.layers.parameter import ShardedParameter

STANDARD_DEVIATION = 0.02


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest, "little", signed=True))
    return generator


def _draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=_generator(name, seed)) * STANDARD_DEVIATION


def tensors(
    index: Mapping[str, tuple[ShardedParameter, str]], seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every full tensor of a model's weight index, float32 on the CPU.

    Norm weights are one, biases zero, the rest normal with a standard deviation of 0.02.
    """
    for name, (parameter, part) in index.items():
        yield name, _draw(name, parameter.parts[part].full_shape, seed)
