"""Weights as a safetensors folder that both sides can see.

The folder is written under another name and renamed when whole, so an engine never reads
half of it.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.protocol import AbortUpdate, BeginUpdate, CommitUpdate, LoadFromDisk, UpdateReport
from trainer_bridge.control import UpdateTarget


def send(
    begin: BeginUpdate,
    tensors: list[tuple[str, torch.Tensor]],
    target: UpdateTarget,
    folder: Path,
    *,
    keep: bool = False,
) -> UpdateReport:
    """Write `folder/weight_v<version>`, have the engine load it, and drop it unless `keep`.

    A failure at any point closes the update, and the engine serves what it served before.
    """
    path = write(folder / f"weight_v{begin.version:06d}", tensors)
    try:
        return load(begin, path, target)
    finally:
        if not keep:
            shutil.rmtree(path)


def write(path: Path, tensors: list[tuple[str, torch.Tensor]]) -> Path:
    """Write one safetensors file into `path`, atomically. Returns `path`."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    contents = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors}
    save_file(contents, partial / "model.safetensors", metadata={"format": "pt"})
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    return path


def load(begin: BeginUpdate, path: Path, target: UpdateTarget) -> UpdateReport:
    """Update the engine from a safetensors folder that exists already."""
    target.send(begin)
    try:
        target.send(LoadFromDisk(path=str(path)))
        reply = target.send(CommitUpdate(version=begin.version))
    except BaseException:
        target.send(AbortUpdate(version=begin.version))
        raise
    assert reply.report is not None
    return reply.report
