"""Entropies of an engine against those of a plain forward pass."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import write_tiny

PROMPT = list(range(5, 30))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-entropy")
    return folder, write_tiny(folder, "llama")


@torch.no_grad()
def exact_entropies(model, output_ids: list[int], temperature: float) -> np.ndarray:
    ids = torch.tensor([[*PROMPT, *output_ids]])
    logits = model(ids).logits[0, len(PROMPT) - 1 : -1].double() / temperature
    return torch.special.entr(logits.softmax(-1)).sum(-1).numpy()


@pytest.mark.parametrize("num_pages", [400, 16])
def test_entropies_are_those_of_a_plain_forward(tiny, num_pages: int) -> None:
    """Beside requests that want none; with 16 pages some of them are retracted."""
    options = {
        "plain": {},
        "cold": {"temperature": 0.6},
        "greedy": {"temperature": 0.0},
        "filtered": {"top_k": 20, "top_p": 0.9},
        "without": {},
        "too": {"temperature": 0.6},
    }
    requests = [
        msgspec.structs.replace(
            request(rid, PROMPT, seed=seed, max_new_tokens=20, **sampling),
            entropy=rid not in ("without", "too"),
        )
        for seed, (rid, sampling) in enumerate(options.items())
    ]
    with make_replica(tiny[0], num_pages=num_pages, prefix_cache=False) as replica:
        replica.submit(requests)
        outputs = drain(replica)
    for rid, sampling in options.items():
        output = outputs[rid]
        if rid in ("without", "too"):
            assert output.entropies is None
            continue
        assert output.entropies is not None and output.entropies.dtype == np.float32
        temperature = sampling.get("temperature", 1.0) or 1.0
        want = exact_entropies(tiny[1], output.token_ids.tolist(), temperature)
        np.testing.assert_allclose(output.entropies, want, atol=1e-4, err_msg=rid)
    retractions = sum(output.num_retractions for output in outputs.values())
    assert (retractions > 0) == (num_pages == 16)
