"""What collectives promise: right values, equal bits on every rank, and an end to every wait."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.config import ParallelConfig
from engine.errors import EngineDead, InvalidRequest
from engine.parallel import process_group
from engine.parallel.collectives import Collectives, NoCollectives
from engine.parallel.connect import connect, rank_device
from engine.parallel.mesh import Mesh
from tests.helpers.thread_ranks import with_collectives

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def summand(rank: int, dtype: torch.dtype, rows: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, 7, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_sums_and_gives_every_rank_the_same_bits(dtype: torch.dtype) -> None:
    sums = with_collectives(3, lambda mesh, group: group.all_reduce(summand(mesh.tp_rank, dtype)))
    exact = sum(summand(rank, dtype).double() for rank in range(3))
    torch.testing.assert_close(sums[0].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in pairwise(sums))
    assert sums[0].dtype == dtype


def test_a_row_is_summed_alike_in_any_batch() -> None:
    def run(mesh: Mesh, group: Collectives) -> bool:
        rows = summand(mesh.tp_rank, torch.float32, rows=64)
        whole = group.all_reduce(rows.clone())
        parts = [group.all_reduce(rows[i : i + 1].clone()) for i in range(64)]
        return torch.equal(whole, torch.cat(parts))

    assert all(with_collectives(4, run))


def test_all_gather_puts_uneven_pieces_side_by_side() -> None:
    sizes = [3, 3, 1, 0]
    full = torch.arange(2 * 7, dtype=torch.float32).view(2, 7)

    def run(mesh: Mesh, group: Collectives) -> torch.Tensor:
        return group.all_gather_last(full.split(sizes, dim=-1)[mesh.tp_rank], sizes)

    for gathered in with_collectives(4, run):
        assert torch.equal(gathered, full)
        assert gathered.is_contiguous()


def test_rows_are_gathered_below_each_other_and_scattered_by_rank() -> None:
    def run(mesh: Mesh, group: Collectives) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = summand(mesh.tp_rank, torch.bfloat16, rows=6)
        whole = group.all_reduce(x.clone())
        return group.all_gather_rows(x), group.reduce_scatter_rows(x.clone()), whole

    found = with_collectives(3, run)
    held = torch.cat([summand(rank, torch.bfloat16, rows=6) for rank in range(3)])
    for rank, (gathered, own, whole) in enumerate(found):
        assert torch.equal(gathered, held)
        assert torch.equal(own, whole[2 * rank : 2 * rank + 2])


def test_ranks_say_how_they_reach_each_other() -> None:
    assert with_collectives(2, lambda mesh, group: group.description) == ["gloo", "gloo"]
    assert NoCollectives().description == "one rank"


def test_minimum_is_that_of_all_ranks() -> None:
    assert with_collectives(2, lambda mesh, group: group.minimum(40 - mesh.tp_rank)) == [39, 39]


def test_a_single_rank_needs_nobody() -> None:
    group = connect(Mesh(), torch.device("cpu"), meeting_place="", timeout_s=1.0)
    assert isinstance(group, NoCollectives)
    x = torch.randn(2, 3)
    assert group.all_reduce(x) is x
    assert group.all_gather_last(x, [3]) is x
    assert group.all_gather_rows(x) is x
    assert group.reduce_scatter_rows(x) is x
    assert group.minimum(7) == 7


def test_a_rank_that_misses_a_collective_ends_it_for_the_others() -> None:
    def run(mesh: Mesh, group: Collectives) -> str:
        if mesh.tp_rank == 1:
            return ""
        with pytest.raises(EngineDead, match="missed a collective") as caught:
            group.all_reduce(torch.zeros(3))
        return caught.value.field

    assert with_collectives(2, run, timeout_s=0.5)[0] == "ranks"


def test_a_rank_that_never_comes_ends_the_wait_of_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process_group, "MEET_S", 0.5)
    with pytest.raises(EngineDead, match=r"2 ranks did not meet within 0\.5 s") as caught:
        connect(
            Mesh(tp_rank=0, tp_size=2),
            torch.device("cpu"),
            meeting_place=str(tmp_path / "meeting"),
            timeout_s=1.0,
        )
    assert caught.value.field == "ranks"


def test_ranks_without_a_place_to_meet_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"rollout\.launch") as caught:
        connect(Mesh(tp_size=2), torch.device("cpu"), meeting_place="", timeout_s=1.0)
    assert caught.value.field == "parallel.tp_size"


def test_a_cpu_rank_has_no_device_of_its_own() -> None:
    cpu = torch.device("cpu")
    assert rank_device(cpu, ParallelConfig(tp_size=2), Mesh(tp_rank=1, tp_size=2)) == cpu


def test_too_few_gpus_are_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    config = ParallelConfig(tp_size=2, base_gpu=2)
    for rank in range(2):
        with pytest.raises(InvalidRequest, match="needs 4 GPUs, 3 are visible"):
            rank_device(torch.device("cuda"), config, Mesh(tp_rank=rank, tp_size=2))


def test_a_single_rank_stays_on_the_gpu_its_process_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number: another thread's current GPU is the first one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert rank_device(torch.device("cuda"), ParallelConfig(), Mesh()) == torch.device("cuda", 3)
