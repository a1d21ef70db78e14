"""How many tokens a trainer computes at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from engine.protocol import FloatArray
from recipes.algorithms.losses import policy_loss
from recipes.algorithms.presets import preset
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.microbatch import microbatches
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.trainers.prefix_tree import PromptResponse, build_tree
from recipes.types import Batch
from tests.helpers.tiny_models import tiny_hf
from tests.helpers.trajectories import random_batch, trajectory

VOCAB = 20
CAPS = (1, 9, 13, 17, 24, 31)
CHANGES: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coef": 0.1},
    "gspo": {"is_level": "sequence", "is_mode": "mask"},
    "cispo": {"is_level": "token"},
}


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


def full_batch(seed: int) -> Batch:
    """A batch with all that a loss may take in, most of it beyond some clip."""
    batch = random_batch(4, 5, vocab=VOCAB, seed=seed)
    rng = np.random.default_rng(seed)
    lengths = [len(t.response_ids) for t in batch.trajectories]

    def near_rollout() -> tuple[FloatArray, ...]:
        noise = [rng.standard_normal(length).astype(np.float32) for length in lengths]
        pairs = zip(batch.trajectories, noise, strict=True)
        return tuple(t.rollout_logprobs + np.float32(0.3) * each for t, each in pairs)

    return dataclasses.replace(
        batch,
        old_logprobs=near_rollout(),
        reference_logprobs=near_rollout(),
        stale=rng.random(len(lengths)) < 0.3,
        kept=tuple(rng.random(length) < 0.8 for length in lengths),
    )


def learned(batch: Batch, cap: int, algorithm: str) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient of all parameters end to end, and the figures."""
    chosen = dataclasses.replace(preset(algorithm, 8), **CHANGES[algorithm])
    trainer = Trainer(
        tiny_hf("llama", vocab_size=VOCAB, hidden_size=32, head_dim=8, tie_word_embeddings=True),
        OptimizerOptions(max_tokens_per_microbatch=cap),
        device=torch.device("cpu"),
        dtype=torch.float32,
        temperature=0.7,
    )
    metrics = TokenMetrics()
    assert trainer.accumulate(batch, functools.partial(policy_loss, algorithm=chosen), metrics)
    grads = [p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None]
    figures = metrics.result()
    figures.pop("perf/trainer_computed_tokens")
    return torch.cat(grads), figures


@pytest.mark.parametrize("algorithm", CHANGES)
def test_what_is_learned_does_not_depend_on_the_size_of_a_micro_batch(algorithm: str) -> None:
    """Whatever the loss takes in, and wherever the cuts fall: in a group, between groups, at
    every sequence."""
    batch = full_batch(0)
    expected, figures = learned(batch, 1 << 20, algorithm)
    largest = float(expected.abs().max())
    assert largest > 0
    for cap in (1, 13, 24):
        gradient, got = learned(batch, cap, algorithm)
        torch.testing.assert_close(gradient, expected, atol=1e-5 * largest, rtol=1e-4)
        assert got == pytest.approx(figures, rel=1e-4, abs=1e-5), cap


def test_micro_batches_are_within_the_cap_and_lose_nothing() -> None:
    for seed in range(20):
        rows = random_batch(5, 4, vocab=VOCAB, seed=seed).trajectories
        packed = [
            PromptResponse(prompt_ids=t.prompt_ids, response_ids=t.response_ids) for t in rows
        ]
        for cap in CAPS:
            parts = microbatches(rows, cap, torch.device("cpu"))
            assert [index for part in parts for index in part] == list(range(len(rows)))
            for part in parts:
                nodes = len(build_tree([packed[index] for index in part]).token_ids)
                assert nodes <= cap or len(part) == 1, (cap, part)
