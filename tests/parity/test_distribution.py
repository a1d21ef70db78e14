"""Tokens sampled by the engine follow the model's exact distribution (chi-square)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.slow

PROMPT = [3, 14, 15, 9, 26]
DRAWS = 4000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder, "llama", vocab_size=40)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The statistic and its degrees of freedom, rare classes pooled to >= 5 expected."""
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    rare = int(np.searchsorted(np.cumsum(expected), 5.0)) + 1
    counts = np.concatenate([[counts[:rare].sum()], counts[rare:]])
    expected = np.concatenate([[expected[:rare].sum()], expected[rare:]])
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7}, {"top_k": 12}, {"top_p": 0.8}], ids=str
)
def test_first_tokens_follow_the_distribution(tiny, sampling) -> None:
    folder, model = tiny
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1].float()
    probs = torch.softmax(logits / sampling.get("temperature", 1.0), -1)
    if "top_k" in sampling:
        probs[probs < probs.topk(sampling["top_k"]).values[-1]] = 0
    if "top_p" in sampling:
        ordered, ids = probs.sort(descending=True)
        drop = ordered.cumsum(0) - ordered >= sampling["top_p"]
        probs[ids[drop]] = 0
    probs = (probs / probs.sum()).double().numpy()

    with make_replica(folder, num_pages=2000) as replica:
        replica.submit(
            [
                request(str(i), PROMPT, seed=1_000_003 * i, max_new_tokens=1, **sampling)
                for i in range(DRAWS)
            ]
        )
        tokens = [int(out.token_ids[0]) for out in drain(replica).values()]
    counts = np.bincount(tokens, minlength=len(probs)).astype(float)
    assert counts[probs == 0].sum() == 0, "a token outside the support was drawn"
    statistic, freedom = chi_square(counts[probs > 0], probs[probs > 0] * DRAWS)
    # Mean `freedom`, variance 2 * `freedom`: five sigma, one false alarm in a million.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
