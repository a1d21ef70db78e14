"""What `benchmarks/sleep.py` compares with: the saver alone, and plain copies to pinned memory."""

from __future__ import annotations

import time

import torch
from sleep_engine import Figures

from engine.protocol import MemoryTag
from engine.saver import TorchMemorySaver


def pinned_copy_ms(gib: float) -> dict[str, float]:
    """Milliseconds of one copy of so many bytes, each way; the device buffer is one piece."""
    if not torch.cuda.is_available() or not gib:
        return {}
    size = min(int(gib * 2**30), torch.cuda.mem_get_info()[0] * 9 // 10, 4 << 30)
    scale = gib * 2**30 / size
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    found = {}
    for name, target, source in (("to_host", host, device), ("to_device", device, host)):
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        found[name] = min(times) * scale * 1e3
    return found


def raw_part(gib: int) -> Figures:
    """The saver alone: one piece of memory unmapped, mapped again and zeroed; then 200 pieces."""
    device = torch.device("cuda")
    saver = TorchMemorySaver(device)
    with saver.region("kv_cache"):
        whole = torch.zeros(gib << 30, dtype=torch.uint8, device=device)
    with saver.region("weights"):
        pieces = [torch.zeros(32 << 20, dtype=torch.uint8, device=device) for _ in range(200)]
    figures: Figures = {"gib": gib}
    for turn in range(3):
        figures[f"one piece, {turn}"] = raw_cycle(saver, "kv_cache", [whole])
        figures[f"200 of 32 MiB, {turn}"] = raw_cycle(saver, "weights", pieces)
    saver.close()
    return figures


def raw_cycle(saver: TorchMemorySaver, tag: MemoryTag, tensors: list[torch.Tensor]) -> Figures:
    """Milliseconds of unmapping, mapping and zeroing."""

    def zero() -> None:
        for tensor in tensors:
            tensor.zero_()

    actions = {
        "unmap": lambda: saver.release(tag, tensors),
        "map": lambda: saver.resume(tag),
        "zero": zero,
    }
    found = {}
    for name, action in actions.items():
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        found[name] = (time.perf_counter() - started) * 1e3
    return found
