"""Results on their way to the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.pending import PendingStep, pack_sampled
from engine.transfer import Fetch, to_device


def test_packed_tokens_and_logprobs_come_back_whole() -> None:
    tokens = torch.tensor([5, 151_935, 0])
    logprobs = torch.tensor([-0.25, -1e30, float("-inf")])
    pending = PendingStep(3, Fetch(pack_sampled(tokens, logprobs)), num_rows=2)
    result = pending.result()
    assert result.step == 3
    assert result.token_ids.tolist() == [5, 151_935]
    assert result.logprobs.dtype == np.float32
    np.testing.assert_array_equal(result.logprobs, np.float32([-0.25, -1e30]))


def test_entropies_ride_along_where_somebody_asked() -> None:
    tokens, logprobs = torch.tensor([5, 6, 7]), torch.tensor([-0.25, -1.0, -2.0])
    packed = pack_sampled(tokens, logprobs, torch.tensor([0.5, 11.9, 0.0]))
    result = PendingStep(1, Fetch(packed), num_rows=2).result()
    assert result.entropies is not None and result.entropies.dtype == np.float32
    np.testing.assert_array_equal(result.entropies, np.float32([0.5, 11.9]))
    np.testing.assert_array_equal(result.logprobs, np.float32([-0.25, -1.0]))
    without = PendingStep(1, Fetch(pack_sampled(tokens, logprobs)), num_rows=2).result()
    assert without.entropies is None


def test_a_step_that_samples_nothing_has_an_empty_result() -> None:
    result = PendingStep(1).result()
    assert len(result.token_ids) == len(result.logprobs) == 0
    assert result.entropies is None


@pytest.mark.gpu
def test_a_fetch_holds_the_values_of_its_moment() -> None:
    device = torch.device("cuda")
    values = to_device(np.arange(1000, dtype=np.int32), device)
    fetches = []
    for _ in range(20):
        fetches.append(Fetch(values))
        values += 1
    for step, fetch in enumerate(fetches):
        np.testing.assert_array_equal(fetch.numpy(), np.arange(1000) + step)
