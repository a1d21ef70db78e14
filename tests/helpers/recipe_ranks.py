"""A recipe in processes that are told what `torchrun` tells its own, forked as
`rank_processes` forks them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch

from recipes import grpo
from recipes.world import leave
from tests.helpers.children import child_environment
from tests.helpers.rank_processes import DEADLINE_S, become_rank, forked, join

Main = Callable[[Sequence[str]], int]
"""A recipe: flags in, exit code out."""


@dataclass(frozen=True)
class Ended:
    """returncode: 0, or that of the first rank that failed. stderr: of all ranks."""

    returncode: int
    stderr: str


def run_recipe(size: int, words: Sequence[str], folder: Path, *, main: Main = grpo.main) -> Ended:
    """The recipe `main` with the flags `words` on `size` ranks, to its end or the first failure.

    folder: where what the ranks say is written.
    """
    with started_recipe(size, words, folder, main=main) as processes:
        codes = join(processes, DEADLINE_S)
    said = [(folder / f"stderr-{rank}.txt").read_text() for rank in range(size)]
    return Ended(next((code for code in codes if code), 0), "\n".join(said))


@contextmanager
def started_recipe(
    size: int, words: Sequence[str], folder: Path, *, main: Main = grpo.main
) -> Iterator[list[BaseProcess]]:
    """The processes of such a run, by rank; what is left of them at the end is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    # As torchrun, whose own process holds the store.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    calls = [(main, list(words), rank, size, store.port, folder) for rank in range(size)]
    with forked(_enter, calls) as processes:
        yield processes


def _enter(main: Main, words: list[str], rank: int, size: int, port: int, folder: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.environ.update(child_environment())
    become_rank(
        rank,
        size,
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    # The picture of the curves takes longer than the steps.
    with mock.patch("recipes.run.run_folder.draw_page"):
        leave(main(words))
