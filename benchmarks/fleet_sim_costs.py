"""What a step costs on an H100, for `benchmarks/fleet_sim.py`, from what was measured there."""

from __future__ import annotations

import json

import checkout
import numpy as np
from fleet_sim_replica import Costs
from gpu_rollout_workloads import WorkloadName, make_workload

FILE = checkout.ROOT / "benchmarks" / "results" / "gpu-rollout-1.5b-h100.json"
_NAMES: tuple[WorkloadName, ...] = ("group", "single", "tail")
_REPLY_S = 0.002
_KV_TOKENS = 1_900_000
"""55 GB of it, at 28,672 bytes a token."""


def measured() -> Costs:
    """Of a model of 1.5B: three workloads say what a step, a row and a token that is read cost."""
    told = json.loads(FILE.read_text())["workloads"]
    rows, seconds = [], []
    for name in _NAMES:
        work = make_workload(name)
        lens = work.output_lens.reshape(work.prompts, work.samples)
        steps = int(lens.max())
        # The prompt of a group is read once for all of its samples.
        read = int((work.prompt_lens * lens.max(1)).sum() + (lens.astype(np.int64) ** 2).sum() // 2)
        rows.append([steps, int(lens.sum()), read])
        seconds.append(told[name]["decode_seconds"])
    step, row, kv = (float(value) for value in not_negative(np.array(rows), np.array(seconds)))
    group = told["group"]
    prompts = int(make_workload("group").prompt_lens.sum())
    return Costs(
        step_s=step,
        row_s=row,
        kv_s=kv,
        prefill_s=(group["seconds"] - group["decode_seconds"]) / prompts,
        reply_s=_REPLY_S,
        max_rows=1024,
        kv_tokens=_KV_TOKENS,
    )


def not_negative(matrix: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Costs [C], none of which is negative, of what `matrix` [N, C] counts in N measurements that
    took so long; each counts by its own length. Least squares: whatever comes out negative is
    left out, the most negative first, and all is solved again."""
    scaled, ones = matrix / seconds[:, None], np.ones(len(seconds))
    used = list(range(matrix.shape[1]))
    while True:
        found = np.linalg.lstsq(scaled[:, used], ones, rcond=None)[0]
        worst = int(np.argmin(found))
        if found[worst] >= 0:
            whole = np.zeros(matrix.shape[1])
            whole[used] = found
            return whole
        del used[worst]
