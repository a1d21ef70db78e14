"""Large results that are there whole or not at all, written by all processes of a run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from engine.errors import DiskFull
from recipes.world import World
from rollout.offline import require_room, writing
from trainer_bridge.adapters.base import WeightSource

WRITING = ".writing_"
REMOVING = ".removing_"


def save_folder(
    final: Path,
    world: World,
    *,
    save: Callable[[Path], None],
    complete: Callable[[Path], None],
    num_bytes: int,
) -> None:
    """Write a temporary folder beside `final` and put it in its place; collective.

    save: writes a share of it, in every process. complete: adds the rest, in the main process.
    num_bytes: an estimate of the whole.

    Raises DiskFull in all processes, before anything is written where the estimate tells it; what
    was at `final` is whole then, and what was begun is gone.
    """
    temporary = final.with_name(f"{WRITING}{final.name}")

    def prepare() -> None:
        remove(temporary)
        require_room(final, num_bytes)
        temporary.mkdir(parents=True)

    def attempt(part: Callable[[Path], None]) -> None:
        with writing(final, num_bytes=num_bytes):
            part(temporary)

    with ExitStack() as on_failure:
        if world.is_main:
            on_failure.callback(remove, temporary)
        together(world, prepare, only_main=True)
        together(world, lambda: attempt(save))
        together(world, lambda: attempt(complete), only_main=True)
        if world.is_main:
            if final.exists():
                remove_renamed(final)
            temporary.rename(final)
        on_failure.pop_all()
    world.barrier()


def together(world: World, part: Callable[[], None], *, only_main: bool = False) -> None:
    """Run `part` in all processes, or in the main one; collective. A full disk met by one process
    is DiskFull in all of them, so that none waits for one that has left."""
    told: list[str] = []
    if world.is_main or not only_main:
        try:
            part()
        except DiskFull as error:
            if world.size == 1:
                raise
            told = [error.message]
    failed = world.gather(told)
    if failed:
        raise DiskFull(failed[0], field="out")


def num_elements(weights: torch.nn.Module | WeightSource) -> int:
    """Elements of all tensors of a trainer's weights (`Learner.weights`)."""
    if isinstance(weights, torch.nn.Module):
        return sum(parameter.numel() for parameter in weights.parameters())
    return sum(math.prod(spec.shape) for spec in weights.specs())


def remove(folder: Path) -> None:
    """Remove a folder that may not be there."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_renamed(folder: Path) -> None:
    """Rename first, so that what is half removed is never taken for whole."""
    doomed = folder.with_name(f"{REMOVING}{folder.name}")
    remove(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)
