"""The loss of supervised fine-tuning, against transformers' own with labels of -100."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from recipes.algorithms.supervised import sft_loss
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.plain import Trainer
from recipes.tuning.example_stream import make_batch
from recipes.tuning.examples import Example
from tests.helpers.char_model import VOCAB, char_model


def examples() -> list[Example]:
    """Equal beginnings, several learnt stretches, lengths of 4 to 12."""
    rng = np.random.default_rng(0)
    found = []
    for length in (4, 9, 12, 7):
        ids = np.concatenate([[3, 4, 5], rng.integers(1, len(VOCAB), length - 3)]).astype(np.int32)
        learnt = rng.random(length) < 0.5
        learnt[:2], learnt[-1] = False, True
        found.append(Example(token_ids=ids, learnt=learnt))
    return found


@pytest.mark.parametrize("max_tokens", [None, 8])
def test_loss_and_gradient_are_those_of_masked_labels(max_tokens: int | None) -> None:
    model = char_model(16, 2)
    plain = copy.deepcopy(model)
    trainer = Trainer(
        model,
        OptimizerOptions(max_tokens_per_microbatch=max_tokens),
        device=torch.device("cpu"),
        dtype=torch.float32,
        temperature=1.0,
    )
    metrics = TokenMetrics()
    assert trainer.accumulate(make_batch(examples()), sft_loss, metrics)
    total, num = torch.zeros(()), 0
    for example in examples():
        ids = torch.from_numpy(example.token_ids).long()[None]
        labels = ids.masked_fill(~torch.from_numpy(example.learnt)[None], -100)
        total = total + plain(ids, labels=labels).loss * example.num_learnt
        num += example.num_learnt
    (total / num).backward()
    assert metrics.loss == pytest.approx(float(total.detach() / num), rel=1e-5)
    ours = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)
