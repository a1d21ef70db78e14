"""What is released, the order in which it comes back, and with which values."""

from __future__ import annotations

import pytest
import torch

from engine.config import MemoryConfig
from engine.errors import InvalidRequest, MemoryReleased, OutOfMemory, UnsupportedOption
from engine.occupancy import ORDER, Occupancy

CPU = torch.device("cpu")


def made(*, backup: bool = False, device: str = "cpu") -> tuple[Occupancy, torch.Tensor, list]:
    occupancy = Occupancy(MemoryConfig(saver=True, cpu_backup=backup), torch.device(device))
    with occupancy.region("weights"):
        weight = torch.full((10, 10), 2.0, device=device)
    with occupancy.region("kv_cache"):
        pool = [torch.full((64,), float("nan"), device=device) for _ in range(2)]
    occupancy.hold("weights", [weight])
    occupancy.hold("kv_cache", pool)
    return occupancy, weight, pool


def test_release_and_resume_report_what_moved_and_repeat_without_effect() -> None:
    occupancy, weight, _ = made()
    report = occupancy.release([])
    assert report.tags == {"cuda_graph": 0, "kv_cache": 512, "weights": 400}
    assert (report.used_bytes, occupancy.released) == (0, list(ORDER))
    assert occupancy.release(["weights"]).tags == {}
    assert weight.untyped_storage().nbytes() == 0
    report = occupancy.resume([])
    assert report.tags == {"weights": 400, "kv_cache": 512, "cuda_graph": 0}
    assert (report.used_bytes, occupancy.released) == (912, [])
    assert occupancy.resume([]).tags == {}


def test_what_comes_back_without_values_is_zero() -> None:
    occupancy, weight, pool = made()
    occupancy.release([])
    occupancy.resume([])
    assert not weight.any()
    assert not any(part.any() for part in pool), "a NaN under a mask would survive"


def test_a_backup_brings_the_weights_back() -> None:
    occupancy, weight, pool = made(backup=True)
    for value in (2.0, 3.0):
        weight.fill_(value)
        occupancy.release([])
        occupancy.resume([])
        assert (weight == value).all()
        assert not any(part.any() for part in pool)


@pytest.mark.parametrize("tags", [["kv_cache"], ["cuda_graph"], ["kv_cache", "cuda_graph"]])
def test_resuming_out_of_order_says_the_order_and_changes_nothing(tags: list) -> None:
    occupancy, _, _ = made()
    occupancy.release([])
    with pytest.raises(MemoryReleased, match="weights, then kv_cache, then cuda_graph") as refusal:
        occupancy.resume(tags)
    assert refusal.value.field == tags[0]
    assert occupancy.released == list(ORDER)
    for tag in ORDER:
        occupancy.resume([tag])
    assert occupancy.released == []


def test_tags_may_be_released_in_any_order() -> None:
    occupancy, _, _ = made()
    for tag in ("kv_cache", "weights", "cuda_graph"):
        occupancy.release([tag])
    assert occupancy.released == list(ORDER)
    occupancy.resume(["kv_cache", "weights"])
    assert occupancy.released == ["cuda_graph"]


def test_require_names_what_to_resume_in_order() -> None:
    occupancy, _, _ = made()
    occupancy.require("weights")
    occupancy.require_all()
    occupancy.release(["weights", "kv_cache"])
    occupancy.require("cuda_graph")
    with pytest.raises(MemoryReleased, match="'weights', then 'kv_cache'") as refusal:
        occupancy.require("kv_cache")
    assert refusal.value.field == "kv_cache"
    with pytest.raises(MemoryReleased, match="resume 'weights' first"):
        occupancy.require("weights")
    with pytest.raises(MemoryReleased):
        occupancy.require_all()


def test_an_engine_built_without_the_saver_says_how_to_start_it() -> None:
    occupancy = Occupancy(MemoryConfig(), CPU)
    for call in (occupancy.release, occupancy.resume):
        with pytest.raises(UnsupportedOption, match=r"start it with memory\.saver on"):
            call([])


@pytest.mark.parametrize("field, value", [("cpu_backup", True), ("trainer_bytes", -1)])
def test_options_without_a_meaning_are_refused(field: str, value: int) -> None:
    with pytest.raises(InvalidRequest, match=field) as refusal:
        Occupancy(MemoryConfig(**{field: value}), CPU)
    assert refusal.value.field == f"memory.{field}"


@pytest.mark.gpu
@pytest.mark.parametrize("backup", [False, True])
def test_gpu_memory_goes_and_comes_back(backup: bool) -> None:
    occupancy, weight, pool = made(backup=backup, device="cuda")
    address = weight.data_ptr()
    for _ in range(3):
        weight.fill_(5.0)
        moved = occupancy.release([]).tags
        assert moved["weights"] > 0 and moved["kv_cache"] > 0
        assert occupancy.resume([]).tags == moved
        assert weight.data_ptr() == address
        assert (weight == (5.0 if backup else 0.0)).all()
        assert not any(part.any() for part in pool)


@pytest.mark.gpu
def test_a_full_gpu_refuses_to_resume_and_can_try_again() -> None:
    occupancy = Occupancy(MemoryConfig(saver=True), torch.device("cuda"))
    with occupancy.region("kv_cache"):
        pool = torch.zeros(2 << 30, dtype=torch.uint8, device="cuda")
    occupancy.hold("kv_cache", [pool])
    occupancy.release([])
    torch.cuda.empty_cache()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - (1 << 30), dtype=torch.uint8, device="cuda")
    with pytest.raises(OutOfMemory, match=r"kv_cache 2\.00 GiB"):
        occupancy.resume([])
    assert occupancy.released == list(ORDER)
    del hog
    occupancy.resume([])
    assert not pool.any()
