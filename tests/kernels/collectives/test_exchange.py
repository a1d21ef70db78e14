"""The kernels that exchange words: in Triton's interpreter between processes, and on GPUs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kernels.testing import triton_device
from tests.helpers.children import ROOT, child_environment
from tests.helpers.exchange_ranks import exchange

DEADLINE_S = 500.0


@pytest.mark.gpu
@pytest.mark.skipif(triton_device() != "cpu", reason="ranks in the interpreter; see below")
@pytest.mark.parametrize(
    "size,width,dtype", [(2, 518, torch.float16), (3, 63, torch.float32), (4, 100, torch.float16)]
)
def test_ranks_exchange_what_they_hold(size: int, width: int, dtype: torch.dtype) -> None:
    """Bfloat16 is cut, not rounded, there."""
    exchange(size, width, dtype)


@pytest.mark.multi_gpu
@pytest.mark.slow
def test_bits_races_and_a_rank_that_does_not_come() -> None:
    script = ROOT / "benchmarks" / "collectives.py"
    parts = ["--parts", "bits", "stress", "abort", "--replays", "500"]
    done = subprocess.run(
        [sys.executable, str(script), "--gpus", "2", *parts],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S + 60.0,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
