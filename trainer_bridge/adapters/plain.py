"""Weights of an unsharded torch module, by the Hugging Face names of its parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter once, detached, under its own name.

    A tensor that several modules share (tied embeddings) comes under its first name only;
    the engine knows its aliases. Wrappers that prefix names (`torch.compile` adds
    `_orig_mod.`, DistributedDataParallel `module.`) are looked through.
    """
    for name, parameter in model.named_parameters():
        yield _bare(name), parameter.detach()


def _bare(name: str) -> str:
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)
