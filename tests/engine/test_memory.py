"""The memory planner: sizes, limits, and refusals that carry their arithmetic."""

from __future__ import annotations

import pytest
import torch

from engine import memory
from engine.config import CacheConfig
from engine.errors import OutOfMemory

GIB = 1 << 30


def plan(cache: CacheConfig, monkeypatch: pytest.MonkeyPatch, *, free: int, device: str = "cuda"):
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    return memory.plan_memory(
        cache,
        page_bytes=1 << 20,
        workspace_bytes=GIB,
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


def test_free_memory_of_this_machine_is_positive() -> None:
    assert memory.free_bytes(torch.device("cpu")) > 0
