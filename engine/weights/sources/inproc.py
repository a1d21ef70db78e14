"""Tensors of a model that lives in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch


def tensors(named: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs of a state dict, detached, sharing its memory."""
    for name, tensor in named.items():
        yield name, tensor.detach()
