"""Random weights that depend on the seed and each tensor's name, on nothing else."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from engine.layers.parameter import ShardedParameter

STANDARD_DEVIATION = 0.02
MAX_THREADS = 12


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest, "little", signed=True))
    return generator


def _draw(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith((".bias", "_bias")):
        return torch.zeros(shape)
    return torch.randn(shape, generator=_generator(name, seed)) * STANDARD_DEVIATION


def tensors(
    index: Mapping[str, tuple[ShardedParameter, str]], seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every full tensor of a model's weight index, float32 on the CPU.

    Norm weights are one, biases zero, the rest normal with a standard deviation of 0.02.
    A generator draws on one core, so several tensors are drawn at once, a few ahead.
    """
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    ahead: deque[tuple[str, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for name, (parameter, part) in index.items():
            shape = parameter.parts[part].full_shape
            ahead.append((name, pool.submit(_draw, name, shape, seed)))
            if len(ahead) > threads:
                first, drawn = ahead.popleft()
                yield first, drawn.result()
        for name, drawn in ahead:
            yield name, drawn.result()
