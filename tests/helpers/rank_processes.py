"""Several trainer ranks as processes of their own, in one gloo group.

They are forked from one process that has imported what they need: the libraries of a trainer take
several seconds of a processor to import, which is most of what a rank would do otherwise.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from recipes.world import leave

Rank = Callable[[int, int, Path], Any]

DEADLINE_S = 300.0
# What is not installed is passed over.
_IMPORTED = [
    "deepspeed",
    # At its import it asks torch to compile functions, which imports all of inductor.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "recipes.grpo",
    "recipes.ppo",
    "recipes.actors.fleet",
    "recipes.trainers.deepspeed",
    "recipes.trainers.fsdp",
    "tests.helpers.sharded_publish",
    "tests.helpers.doomed_ranks",
    "tests.helpers.source_ranks",
    "tests.helpers.trainer_ranks",
    "tests.helpers.critic_ranks",
    "tests.helpers.expert_ranks",
]


def run_ranks(act: Rank, size: int, folder: Path, *, timeout_s: float = DEADLINE_S) -> list[Any]:
    """`act(rank, size, folder)` in `size` processes at once; what each returned, by rank.

    act: a function at the top of an importable module. Its result is saved by torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with forked(_enter, [(act, rank, size, folder) for rank in range(size)]) as processes:
        codes = join(processes, timeout_s)
    assert codes == [0] * size, f"{codes}\n{_said(folder)}"
    return [torch.load(folder / f"result-{r}.pt", weights_only=False) for r in range(size)]


@contextmanager
def forked(enter: Callable[..., None], calls: list[tuple[Any, ...]]) -> Iterator[list[BaseProcess]]:
    """A process for each of `calls`, which are the arguments of `enter`, a function at the top of
    an importable module; what is left of them at the end is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    processes: list[BaseProcess] = [context.Process(target=enter, args=call) for call in calls]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def join(processes: list[BaseProcess], timeout_s: float = DEADLINE_S) -> list[int | None]:
    """Exit codes once all have left, or one has failed: None for those that still run then."""
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            break
        assert time.monotonic() < deadline, "the ranks take too long"
        time.sleep(0.02)
    return [process.exitcode for process in processes]


def become_rank(rank: int, size: int, **more: str) -> None:
    """Set what `torchrun` tells a process of one host, and one thread for torch."""
    # DeepSpeed collects garbage again and again: the modules that are there are none.
    gc.freeze()
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        **more,
    )
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    torch.set_num_threads(1)


def _enter(act: Rank, rank: int, size: int, folder: Path) -> None:
    become_rank(rank, size, MASTER_PORT="29500")
    store = torch.distributed.FileStore(str(folder / "store"), size)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=DEADLINE_S)
    )
    try:
        torch.save(act(rank, size, folder), folder / f"result-{rank}.pt")
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        torch.distributed.destroy_process_group()
    # As the recipe's own processes do, and for the same reason.
    leave(0)


def _said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))
