"""The kernels of the collectives in Triton's interpreter: ranks are processes that share memory."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.multiprocessing

from kernels.collectives import reference
from kernels.collectives.mailbox import EMPTY, Mailbox, open_mailbox, words_shape

ROUNDS = 2
EPS = 1e-5


def exchange(size: int, width: int, dtype: torch.dtype) -> None:
    """Run every op on `size` ranks, some rounds after each other; raises what a rank raised."""
    shape = words_shape(size, 0)
    memory = [torch.empty(shape, dtype=torch.int32).share_memory_() for _ in range(size)]
    for words in memory:
        words.fill_(EMPTY)
    torch.multiprocessing.spawn(_rank, args=(memory, width, dtype), nprocs=size)
    assert all(bool((words == EMPTY).all()) for words in memory), "something was left unread"


def _rank(rank: int, memory: Sequence[torch.Tensor], width: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    give_up = torch.zeros(1, dtype=torch.int32)
    # Emptied already: a rank that comes later would throw away what others have left by now.
    box = replace(
        open_mailbox(rank, torch.empty_like(memory[rank]), _addresses(memory), give_up),
        words=memory[rank],
    )
    rng = random.Random(rank)
    for seed in range(ROUNDS):
        _round(box, width, dtype, seed, rng)


def _addresses(memory: Sequence[torch.Tensor]) -> list[int]:
    return [words.data_ptr() for words in memory]


def _round(box: Mailbox, width: int, dtype: torch.dtype, seed: int, rng: random.Random) -> None:
    from kernels.collectives import triton as own
    from kernels.collectives.plan import Cut
    from kernels.norm.triton import add_rms_norm

    generator = torch.Generator().manual_seed(seed)

    def held(*shape: int) -> list[torch.Tensor]:
        """What every rank holds. The first words are EMPTY by themselves, of one rank."""
        found = [torch.randn(shape, generator=generator).to(dtype) for _ in range(box.size)]
        found[seed % box.size].view(-1).view(torch.int32)[:2] = EMPTY
        time.sleep(rng.random() * 0.01)
        return found

    few, many = Cut(32, 1, 3), Cut(32, 1, 100)
    for shots in (1, 2):
        parts = held(width)
        _same(own.all_reduce(parts[box.rank], box, shots, few), reference.all_reduce(parts))
    parts = held(3, width)
    _same(own.all_gather_rows(parts[box.rank], box, many), reference.all_gather_rows(parts))
    parts = held(3 * box.size, width)
    want = reference.reduce_scatter_rows(parts, box.rank)
    _same(own.reduce_scatter_rows(parts[box.rank], box, many), want)
    parts, residual = held(3, width), torch.randn(3, width, generator=generator).to(dtype)
    weight = torch.rand(width, generator=generator).to(dtype)
    got = own.all_reduce_add_rms_norm(parts[box.rank], residual, weight, EPS, box)
    apart = add_rms_norm(reference.all_reduce(parts), residual, weight, EPS)
    for one, other in zip(got, apart, strict=True):
        _same(one, other)


def _same(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits, of NaN any."""
    assert got.shape == want.shape
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
