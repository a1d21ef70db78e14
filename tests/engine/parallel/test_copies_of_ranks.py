"""Where a rank is among copies of a model, whom it computes with and whom it agrees with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import ParallelConfig
from engine.errors import EngineDead, InvalidRequest
from engine.parallel import process_group
from engine.parallel.collectives import Collectives
from engine.parallel.connect import connect, rank_device
from engine.parallel.mesh import Mesh
from tests.helpers.thread_ranks import with_collectives

PARALLEL = ParallelConfig(dp_size=2, tp_size=3)


def test_the_ranks_of_a_copy_are_adjacent() -> None:
    meshes = [Mesh.of(PARALLEL, rank) for rank in range(6)]
    assert [(mesh.dp_rank, mesh.tp_rank) for mesh in meshes] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert [mesh.rank for mesh in meshes] == list(range(6))
    assert {mesh.size for mesh in meshes} == {6}
    assert PARALLEL.rank_name(4) == "rank 4 (dp 1, tp 1)"
    assert ParallelConfig(tp_size=2).rank_name(1) == "rank 1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"tp_rank": 2, "tp_size": 2},
        {"dp_rank": 2, "dp_size": 2},
        {"dp_size": 0},
        {"dp_rank": -1, "dp_size": 2},
        {"dp_size": 2, "tp_size": 2, "ep_size": 2},
    ],
    ids=str,
)
def test_a_place_that_is_none_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rank"):
        Mesh(**wrong)
    assert Mesh(dp_size=2, tp_size=2, ep_size=4).size == 4


@pytest.mark.parametrize("tp_size", [1, 2])
def test_sums_are_of_a_copy_and_agreements_of_all(tp_size: int) -> None:
    def run(mesh: Mesh, group: Collectives) -> tuple[float, list[float], int, int]:
        x = torch.full((2, 3), float(10**mesh.rank))
        side = group.all_gather_last(torch.full((1,), float(mesh.rank)), [1] * mesh.tp_size)
        least, agreed = group.minimum(20 - mesh.rank), group.agree(9 - 2 * mesh.rank)
        return float(group.all_reduce(x)[1, 1]), side.tolist(), least, agreed

    found = with_collectives(tp_size, run, dp_size=3)
    size = 3 * tp_size
    for rank, (total, side, least, agreed) in enumerate(found):
        first = rank - rank % tp_size
        own = range(first, first + tp_size)
        assert total == sum(10.0**other for other in own)
        assert side == list(own)
        assert (least, agreed) == (21 - size, 11 - 2 * size)


def test_a_copy_that_never_comes_ends_the_wait_of_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process_group, "MEET_S", 0.5)
    place = str(tmp_path / "meeting")
    with pytest.raises(EngineDead, match=r"2 ranks did not meet within 0\.5 s"):
        connect(Mesh(dp_size=2), torch.device("cpu"), meeting_place=place, timeout_s=1.0)
    with pytest.raises(
        InvalidRequest, match="dp_size 2 with tp_size 1 takes 2 processes"
    ) as caught:
        connect(Mesh(dp_size=2), torch.device("cpu"), meeting_place="", timeout_s=1.0)
    assert caught.value.field == "parallel.dp_size"


def test_every_rank_of_every_copy_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    config = ParallelConfig(dp_size=2, tp_size=3, base_gpu=1)
    cuda = torch.device("cuda")
    devices = [rank_device(cuda, config, Mesh.of(config, rank)) for rank in range(6)]
    assert [device.index for device in devices] == chosen == [1, 2, 3, 4, 5, 6]
    few = ParallelConfig(dp_size=3, tp_size=3)
    with pytest.raises(InvalidRequest, match="needs 9 GPUs, 7 are visible") as caught:
        rank_device(cuda, few, Mesh.of(few, 0))
    assert caught.value.field == "parallel.dp_size"
