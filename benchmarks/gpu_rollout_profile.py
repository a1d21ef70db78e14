"""Kernel times and idle time of decode steps on a GPU, from torch's profiler."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.autograd import DeviceType


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Microseconds a step, medians; `kernels`: (name, calls, microseconds), most time first.

    gap: from the end of a step's copy to the host until the next step's first kernel or copy.
    between: gaps inside a step, kernel to kernel. The profiler itself slows kernels a little.
    """

    step_us: float
    busy_us: float
    gap_us: float
    between_us: float
    kernels: list[tuple[str, float, float]]


def profile_steps(step: Callable[[], Any], count: int) -> StepProfile:
    """Profile `count` decode steps, each of which ends with its copy to the host."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    events = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    steps = _split(sorted(events))
    assert len(steps) >= 3, "too few steps were seen"
    gaps = [b[0][0] - a[-1][1] for a, b in pairwise(steps)]
    inner = steps[1:-1]
    spans = [s[-1][1] - s[0][0] for s in inner]
    busy = [_busy(s) for s in inner]
    gap = statistics.median(gaps)
    return StepProfile(
        step_us=statistics.median(spans) + gap,
        busy_us=statistics.median(busy),
        gap_us=gap,
        between_us=statistics.median(a - b for a, b in zip(spans, busy, strict=True)),
        kernels=_by_kernel(inner),
    )


Event = tuple[float, float, str]


def _split(events: list[Event]) -> list[list[Event]]:
    """Steps end with the copy of their result to the host."""
    steps: list[list[Event]] = [[]]
    for event in events:
        steps[-1].append(event)
        if "DtoH" in event[2]:
            steps.append([])
    return [step for step in steps if step and "DtoH" in step[-1][2]]


def _busy(events: list[Event]) -> float:
    total, until = 0.0, float("-inf")
    for start, end, _ in events:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _by_kernel(steps: list[list[Event]]) -> list[tuple[str, float, float]]:
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    for start, end, name in (event for step in steps for event in step):
        calls[name] += 1
        spent[name] += end - start
    count = len(steps)
    rows = [(name, calls[name] / count, spent[name] / count) for name in calls]
    return sorted(rows, key=lambda row: -row[2])
