"""What the engine's loop adds to its own CUDA graphs: wall time of a step over a bare replay."""

from __future__ import annotations

import statistics
import time
from typing import Any
from unittest import mock

import numpy as np
import torch
from gpu_rollout_engine import Bench
from gpu_rollout_profile import profile_steps
from gpu_rollout_workloads import Workload

WARM_STEPS = 20
PROFILED_STEPS = 12


def replay_ratio(
    bench: Bench, rows: int, *, steps: int = 100, prompt_tokens: int = 64
) -> dict[str, float]:
    """Times of decode steps of `rows` distinct sequences, milliseconds, and their ratio.

    loop_ms: wall time of a step when the leader plans, launches and collects `steps` of them.
    bare_ms: the same step's graph, replayed as often with nothing from the host in between;
    mean of before and after the loop, since the KV grows by `steps` tokens meanwhile. gap_us:
    idle time of the GPU between steps, median of a profiled run.
    """
    outputs = np.full(rows, 2 * WARM_STEPS + steps + PROFILED_STEPS + 20)
    work = Workload(
        name=f"replay {rows}",
        samples=1,
        prompt_lens=np.full(rows, prompt_tokens),
        output_lens=outputs,
    )
    bench.submit(bench.requests(work))
    _decode_all(bench, rows)
    before = _bare_ms(_graphs_of_a_step(bench), steps)
    loop = _loop_ms(bench, steps)
    after = _bare_ms(_graphs_of_a_step(bench), steps)
    profile = profile_steps(bench.replica.step, PROFILED_STEPS)
    bench.abandon()
    bare = (before + after) / 2
    return {
        "rows": rows,
        "steps": steps,
        "loop_ms": loop,
        "bare_ms": bare,
        "ratio": loop / bare,
        "gap_us": profile.gap_us,
    }


def _decode_all(bench: Bench, rows: int) -> None:
    """Step until all rows have decoded together for a while."""
    together = 0
    while together < WARM_STEPS:
        bench.replica.step()
        full = bench.executor.decode_only and bench.executor.num_rows == rows
        together = together + 1 if full else 0
        assert not bench.replica.idle(), f"{rows} rows never ran together"


def _loop_ms(bench: Bench, steps: int) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        bench.replica.step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / steps


def _graphs_of_a_step(bench: Bench) -> list[Any]:
    """The graphs that one step replays, whatever the engine keeps them under."""
    seen: list[Any] = []
    replay = torch.cuda.CUDAGraph.replay

    def remember(graph: Any) -> None:
        seen.append(graph)
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", remember):
        bench.replica.step()
    torch.cuda.synchronize()
    assert seen, "a decode step replayed no graph"
    return seen


def _bare_ms(graphs: list[Any], steps: int, repeats: int = 3) -> float:
    """Replays of the newest step: it writes the same KV and token to the same place again."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        start.record()
        for _ in range(steps):
            for graph in graphs:
                graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / steps)
    return statistics.median(times)
