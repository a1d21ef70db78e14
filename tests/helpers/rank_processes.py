"""Several trainer ranks as processes of their own, in one gloo group."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from recipes.world import leave

Rank = Callable[[int, int, Path], Any]


def run_ranks(act: Rank, size: int, folder: Path, *, timeout_s: float = 120.0) -> list[Any]:
    """`act(rank, size, folder)` in `size` processes at once; what each returned, by rank.

    act: a function at the top of an importable module. Its result is saved by torch.
    """
    context = multiprocessing.get_context("spawn")
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        context.Process(target=_enter, args=(act, rank, size, folder), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.is_alive() for process in processes):
            failed = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            assert not failed, _said(folder)
            assert time.monotonic() < deadline, f"the ranks take too long\n{_said(folder)}"
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert all(process.exitcode == 0 for process in processes), _said(folder)
    return [torch.load(folder / f"result-{r}.pt", weights_only=False) for r in range(size)]


def _enter(act: Rank, rank: int, size: int, folder: Path) -> None:
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), size)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
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
