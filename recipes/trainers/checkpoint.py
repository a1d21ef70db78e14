"""Checkpoints that are there whole or not at all.

A checkpoint is written to a temporary folder, every file synced, and the folder renamed: a run
killed at any moment finds the last complete one. Older ones are removed only after that.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

PREFIX = "step_"
TENSORS = "trainer.pt"
STATE = "state.json"


def save_checkpoint(
    folder: Path, step: int, trainer_state: dict[str, Any], progress: dict[str, Any]
) -> Path:
    """Write `folder/step_<step>` and remove the checkpoints before it.

    trainer_state: tensors (`Trainer.state_dict`). progress: what JSON can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{step:06d}"
    temporary = folder / f".writing_{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    torch.save({"trainer": trainer_state, "rng": _torch_rng()}, temporary / TENSORS)
    state = {"progress": progress, "rng": _host_rng()}
    (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
    for path in (temporary / TENSORS, temporary / STATE, temporary):
        _sync(path)
    if final.exists():
        _remove(final)
    temporary.rename(final)
    _sync(folder)
    for old in _complete(folder):
        if old != final:
            _remove(old)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; None if there is none."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainer_state, progress) as they were saved; also restores the global RNGs."""
    tensors = torch.load(checkpoint / TENSORS, map_location="cpu", weights_only=True)
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    _restore_rng(tensors["rng"], state["rng"])
    return tensors["trainer"], state["progress"]


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


def _remove(checkpoint: Path) -> None:
    """Rename first, so that a half-removed checkpoint is never taken for a whole one."""
    doomed = checkpoint.with_name(f".removing_{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _torch_rng() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _host_rng() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def _restore_rng(torch_rng: dict[str, Any], host_rng: dict[str, Any]) -> None:
    torch.set_rng_state(torch_rng["cpu"])
    if torch_rng["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(torch_rng["cuda"])
    name, keys, position, has_gauss, gauss = host_rng["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = host_rng["python"]
    random.setstate((version, tuple(internal), gauss_next))
