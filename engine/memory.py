"""The memory planner: how many KV pages fit, with its arithmetic in every refusal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import CacheConfig
from engine.errors import OutOfMemory

# A CPU's memory is shared with the trainer and everything else on the machine.
CPU_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How the KV pool was sized. All sizes in bytes."""

    num_pages: int
    page_bytes: int
    free_bytes: int
    workspace_bytes: int
    reason: str

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def describe(self) -> str:
        """One line with the whole arithmetic, for the log and for refusals."""
        return (
            f"KV pool: {self.num_pages} pages x {self.page_bytes} B = {_gib(self.kv_bytes)} "
            f"({self.reason}); free {_gib(self.free_bytes)}, "
            f"kept for activations {_gib(self.workspace_bytes)}"
        )


def plan_memory(
    cache: CacheConfig,
    *,
    page_bytes: int,
    workspace_bytes: int,
    device: torch.device,
    context_length: int,
    max_running: int,
) -> MemoryPlan:
    """Size the KV pool after the weights are loaded.

    page_bytes: K and V of one page over all layers. workspace_bytes: largest activations of
    one step. Raises OutOfMemory when not even one sequence of `context_length` tokens fits.
    """
    free = free_bytes(device)
    wanted, reason = _wanted_bytes(cache, free, workspace_bytes, device)
    if cache.num_pages is not None:
        num_pages, reason = cache.num_pages, f"num_pages={cache.num_pages}"
    else:
        # More than every slot at full length could never be used.
        most = max_running * -(-context_length // cache.page_size)
        num_pages = min(wanted // page_bytes, most)
    plan = MemoryPlan(
        num_pages=num_pages,
        page_bytes=page_bytes,
        free_bytes=free,
        workspace_bytes=workspace_bytes,
        reason=reason,
    )
    _refuse_if_too_small(plan, cache)
    return plan


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reusable)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 << 30


def _wanted_bytes(
    cache: CacheConfig, free: int, workspace: int, device: torch.device
) -> tuple[int, str]:
    if cache.memory_bytes is not None:
        return cache.memory_bytes, f"memory_bytes={cache.memory_bytes}"
    share = cache.memory_fraction * (1.0 if device.type == "cuda" else CPU_SHARE)
    wanted = max(0, int((free - workspace) * share))
    return wanted, f"{share:.2f} of free memory less activations"


def _refuse_if_too_small(plan: MemoryPlan, cache: CacheConfig) -> None:
    if plan.num_pages < 2:
        raise OutOfMemory(
            f"no room for a KV cache. {plan.describe()}. Free memory, raise memory_bytes or "
            "memory_fraction, or choose a smaller model",
            field="cache.memory_bytes",
        )
    if plan.kv_bytes > plan.free_bytes:
        asked = "num_pages" if cache.num_pages is not None else "memory_bytes"
        raise OutOfMemory(
            f"cache.{asked} asks for more than there is. {plan.describe()}",
            field=f"cache.{asked}",
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
