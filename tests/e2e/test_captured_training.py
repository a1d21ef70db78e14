"""An agent that only knows a base URL is trained: one update on rollouts that a server captured."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from recipes.algorithms.losses import policy_loss
from recipes.algorithms.presets import preset
from recipes.collecting.captured import captured_batch
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from tests.helpers.serve_process import ServerProcess
from tests.helpers.tiny_models import tiny_hf
from tests.helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 300, "hidden_size": 32, "head_dim": 8, "eos_token_id": 299}


def run_agent(base_url: str, seed: int) -> None:
    """Three turns, knowing nothing of rollouts."""
    messages: list[Any] = [{"role": "user", "content": "go"}]
    with httpx.Client(base_url=base_url, timeout=60.0) as http:
        for turn in range(3):
            body = {"messages": messages, "max_tokens": 5, "seed": seed + turn, "ignore_eos": True}
            reply = http.post("chat/completions", json=body).raise_for_status().json()
            messages += [reply["choices"][0]["message"], {"role": "user", "content": "on"}]


def test_one_update_on_captured_rollouts(tmp_path: Path) -> None:
    model = tiny_hf("llama", **SIZES)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().write_hf(tmp_path)
    options = ["--model", str(tmp_path), "--dtype", "float32", "--device", "cpu", "--port", "0"]
    records = []
    command = ["-m", "rollout", "serve", *options, "--kv-memory", "0.05"]
    with (
        ServerProcess(command) as server,
        httpx.Client(base_url=server.url, timeout=60.0) as http,
    ):
        for number in range(4):
            opened = http.post("/rollouts", json={}).raise_for_status().json()
            run_agent(f"{server.url}{opened['base_url']}/", seed=10 * number)
            path = f"/rollouts/{opened['id']}"
            http.post(f"{path}/reward", json={"reward": number % 2}).raise_for_status()
            records.append(http.get(path).raise_for_status().json())
    algorithm = preset("grpo", 8)
    batch = captured_batch([records], algorithm, max_new_tokens=5)
    assert all(record["complete"] for record in records)
    assert len(batch.trajectories) == 4, "three turns are one branch"
    trainer = Trainer(
        model,
        OptimizerOptions(lr=1e-3),
        device=torch.device("cpu"),
        dtype=torch.float32,
        temperature=1.0,
    )
    # The record is exact: the trainer finds the log-probabilities that the engine returned.
    scored = trainer.logprobs(batch.trajectories)
    assert batch.kept is not None
    for found, trajectory, kept in zip(scored, batch.trajectories, batch.kept, strict=True):
        assert int(kept.sum()) == 15
        np.testing.assert_allclose(found[kept], trajectory.rollout_logprobs[kept], atol=1e-4)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    loss = functools.partial(policy_loss, algorithm=algorithm)
    assert trainer.accumulate(batch, loss, TokenMetrics())
    trainer.step(1e-3)
    assert any(
        not torch.equal(old, new)
        for old, new in zip(before, trainer.model.parameters(), strict=True)
    )
