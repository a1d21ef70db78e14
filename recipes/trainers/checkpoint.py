"""Checkpoints that are there whole or not at all.

A checkpoint is written to a temporary folder, every file synced, and the folder renamed: a run
killed at any moment finds the last complete one. Older ones are removed only after that.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.protocol import decode, encode
from recipes.run.saving import (
    REMOVING,
    WRITING,
    num_elements,
    remove,
    remove_renamed,
    save_folder,
)
from recipes.types import Group, UnfinishedGroup
from recipes.world import World
from rollout.offline import sync
from trainer_bridge.adapters.base import WeightSource

PREFIX = "step_"
RNG = "rng.pt"
STATE = "state.json"
SURPLUS = "surplus.msgpack"
UNFINISHED = "unfinished.msgpack"


def save_checkpoint(
    folder: Path,
    step: int,
    save: Callable[[Path], None],
    progress: dict[str, Any],
    world: World | None = None,
    *,
    surplus: Sequence[Group] = (),
    unfinished: Sequence[UnfinishedGroup] = (),
    num_bytes: int = 0,
) -> Path:
    """Write `folder/step_<step>` and remove the checkpoints before it; collective.

    save: writes the trainer into a folder (`Learner.save`). progress: what JSON can hold.
    surplus: groups that were sampled and not yet trained on. unfinished: groups that are being
    sampled. num_bytes: an estimate of what `save` writes (`checkpoint_bytes`).

    Raises DiskFull in all processes, before anything is written where the estimate tells it; the
    checkpoint before is whole then, and what was begun is gone.
    """
    world = world or World()
    final = folder / f"{PREFIX}{step:06d}"
    if world.is_main:
        _remove_unfinished(folder)
    save_folder(
        final,
        world,
        save=save,
        complete=lambda temporary: _complete_folder(temporary, progress, surplus, unfinished),
        num_bytes=max(num_bytes, _size(latest_checkpoint(folder))),
    )
    if world.is_main:
        _keep_only(final)
    world.barrier()
    return final


def checkpoint_bytes(weights: torch.nn.Module | WeightSource) -> int:
    """About the bytes of a checkpoint of these weights: float32 masters and AdamW's two moments."""
    return 3 * 4 * num_elements(weights)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed while it wrote or removed a checkpoint left."""
    for mark in (WRITING, REMOVING):
        for path in folder.glob(f"{mark}*"):
            remove(path)


def _size(folder: Path | None) -> int:
    if folder is None:
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _complete_folder(
    temporary: Path,
    progress: dict[str, Any],
    surplus: Sequence[Group],
    unfinished: Sequence[UnfinishedGroup],
) -> None:
    """Add what the trainer does not know, and have everything on the disk."""
    torch.save(_torch_rng(), temporary / RNG)
    (temporary / SURPLUS).write_bytes(encode(list(surplus)))
    (temporary / UNFINISHED).write_bytes(encode(list(unfinished)))
    state = {"progress": progress, "rng": _host_rng()}
    (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
    for path in (*sorted(temporary.rglob("*")), temporary):
        sync(path)


def _keep_only(final: Path) -> None:
    sync(final.parent)
    for old in _complete(final.parent):
        if old != final:
            remove_renamed(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; None if there is none."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load_checkpoint(
    checkpoint: Path, load: Callable[[Path], None]
) -> tuple[dict[str, Any], list[Group]]:
    """The progress and the surplus groups as they were saved; also restores the trainer, by `load`
    (`Learner.load`), and the global RNGs."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    load(checkpoint)
    rng = torch.load(checkpoint / RNG, map_location="cpu", weights_only=True)
    _restore_rng(rng, state["rng"])
    progress: dict[str, Any] = state["progress"]
    surplus: list[Group] = decode((checkpoint / SURPLUS).read_bytes(), list[Group])
    return progress, [_sharing_prompt(group) for group in surplus]


def load_unfinished(checkpoint: Path) -> list[UnfinishedGroup]:
    """The groups that were being sampled; none of a checkpoint that has no such file."""
    path = checkpoint / UNFINISHED
    if not path.exists():
        return []
    unfinished: list[UnfinishedGroup] = decode(path.read_bytes(), list[UnfinishedGroup])
    return unfinished


def _sharing_prompt(group: Group) -> Group:
    """The group with one prompt array for all its samples, as it had when they were sampled; its
    routes were in the memory of processes that are gone."""
    prompt_ids = group.trajectories[0].prompt_ids
    trajectories = tuple(replace(t, prompt_ids=prompt_ids, routes=None) for t in group.trajectories)
    return replace(group, trajectories=trajectories)


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []


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
