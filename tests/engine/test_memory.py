"""The memory planner: sizes, limits, and refusals that carry their arithmetic."""

from __future__ import annotations

import pytest
import torch

from engine import memory
from engine.config import CacheConfig
from engine.errors import OutOfMemory

GIB = 1 << 30


def plan(
    cache: CacheConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    free: int,
    device: str = "cuda",
    route_bytes: int = 0,
    **needs: int,
) -> memory.MemoryPlan:
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    return memory.plan_memory(
        cache,
        page_bytes=1 << 20,
        route_bytes=route_bytes,
        needs=memory.Needs(workspace=GIB, **needs),
        device=torch.device(device),
        context_length=32768,
        max_running=64,
    )


def test_a_gpu_gives_its_fraction_of_what_is_free_less_the_workspace(monkeypatch) -> None:
    found = plan(CacheConfig(memory_fraction=0.5), monkeypatch, free=11 * GIB)
    assert found.kv_bytes == 5 * GIB
    assert "0.50 of free memory" in found.describe()


def test_a_cpu_gives_a_quarter_of_that(monkeypatch) -> None:
    found = plan(CacheConfig(memory_fraction=0.5), monkeypatch, free=17 * GIB, device="cpu")
    assert found.kv_bytes == 2 * GIB


def test_no_more_than_every_slot_at_full_length(monkeypatch) -> None:
    found = plan(CacheConfig(), monkeypatch, free=10_000 * GIB)
    assert found.num_pages == 64 * 32768 // 16


def test_explicit_sizes_win(monkeypatch) -> None:
    assert plan(CacheConfig(memory_bytes=GIB), monkeypatch, free=9 * GIB).num_pages == 1024
    assert plan(CacheConfig(num_pages=77), monkeypatch, free=9 * GIB).num_pages == 77


@pytest.mark.parametrize(
    "cache,field",
    [
        (CacheConfig(num_pages=100_000), "cache.num_pages"),
        (CacheConfig(memory_bytes=99 * GIB), "cache.memory_bytes"),
        (CacheConfig(memory_bytes=1000), "cache.memory_bytes"),
    ],
)
def test_refuses_with_numbers(cache: CacheConfig, field: str, monkeypatch) -> None:
    with pytest.raises(OutOfMemory, match=r"free 9\.00 GiB") as refusal:
        plan(cache, monkeypatch, free=9 * GIB)
    assert refusal.value.field == field


def test_what_others_need_is_kept_free(monkeypatch) -> None:
    needs = {"graphs": GIB, "trainer": 2 * GIB, "shadow": 3 * GIB}
    found = plan(CacheConfig(memory_fraction=0.5), monkeypatch, free=11 * GIB, **needs)
    assert found.kv_bytes == 2 * GIB
    assert "2.00 GiB for the trainer, 3.00 GiB for a shadow" in found.describe()


def test_routes_are_bytes_of_a_page(monkeypatch) -> None:
    whole = plan(CacheConfig(memory_bytes=GIB), monkeypatch, free=9 * GIB)
    found = plan(CacheConfig(memory_bytes=GIB), monkeypatch, free=9 * GIB, route_bytes=1 << 18)
    assert (whole.num_pages, found.num_pages) == (1024, 819)
    assert "B, 262144 of them routes, =" in found.describe()
    assert "routes" not in whole.describe()


def test_an_explicit_pool_that_leaves_the_trainer_too_little_is_refused(monkeypatch) -> None:
    with pytest.raises(OutOfMemory, match=r"6\.00 GiB for the trainer") as refusal:
        plan(CacheConfig(memory_bytes=3 * GIB), monkeypatch, free=9 * GIB, trainer=6 * GIB)
    assert refusal.value.field == "cache.memory_bytes"


def test_weights_that_do_not_fit_are_refused_before_they_are_allocated(monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 9 * GIB)
    memory.require_room(9 * GIB, torch.device("cuda"))
    with pytest.raises(OutOfMemory, match=r"take 10\.00 GiB, and 9\.00 GiB"):
        memory.require_room(10 * GIB, torch.device("cuda"))


def test_free_memory_of_this_machine_is_positive() -> None:
    assert memory.free_bytes(torch.device("cpu")) > 0
