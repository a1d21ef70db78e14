"""How many tokens a trainer computes at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipes.trainers.microbatch import microbatches
from tests.helpers.trajectories import trajectory


@pytest.mark.parametrize(("device", "most"), [("cpu", 1536), ("cuda", 4096)])
def test_without_a_number_a_micro_batch_is_what_suits_the_device(device: str, most: int) -> None:
    prompt = np.arange(10, dtype=np.int32)
    rows = [trajectory(prompt, [token] * 256) for token in range(64)]
    parts = microbatches(rows, None, torch.device(device))
    assert [i for part in parts for i in part] == list(range(64))
    # Each row adds 255 nodes to the prompt's; a micro-batch is as full as it can be.
    full = (most - len(prompt)) // 255
    assert max(map(len, parts)) == full
    assert len(microbatches(rows, 300, torch.device(device))) == 64
