"""Logprobs of named tokens, by the engine as a whole: those that all tokens have, looked up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from engine.protocol import TopLogprobs
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import write_tiny

PROMPT = list(range(3, 40))
NAMED = [7, 2, 7, 50]


def looked_up(top: TopLogprobs, columns: slice) -> np.ndarray:
    """Logprobs of NAMED, position by position, from those in `columns`."""
    rows = zip(top.ids[:, columns].tolist(), top.logprobs[:, columns].tolist(), strict=True)
    return np.array([[dict(zip(*row, strict=True))[token] for token in NAMED] for row in rows])


@pytest.mark.parametrize("chunk", [128, 16])
def test_they_are_those_of_the_whole_vocabulary(chunk: int, tmp_path: Path) -> None:
    """In one batch with rows that ask for nothing, or for the likeliest alone."""
    write_tiny(tmp_path, "qwen2")
    with make_replica(tmp_path, max_chunk_tokens=chunk) as replica:
        size = replica.state().vocab_size
        plain = [
            request(rid, PROMPT, seed=1, temperature=0.7, max_new_tokens=5, logit_bias={7: 2.0})
            for rid in ("none", "all", "named", "both")
        ]
        asks = [
            {},
            {"top_logprobs": size, "prompt_logprob_start": 0},
            {"logprob_ids": NAMED, "prompt_logprob_start": 4},
            {"logprob_ids": NAMED, "top_logprobs": 3},
        ]
        replica.submit([replace(r, **more) for r, more in zip(plain, asks, strict=True)])
        found = drain(replica)
    every, named, both = (found[rid] for rid in ("all", "named", "both"))
    assert found["none"].top is None
    assert every.token_ids.tolist() == named.token_ids.tolist() == both.token_ids.tolist()
    want = looked_up(every.top, slice(0, size))
    for top, first in ((named.top, 0), (both.top, 3)):
        assert top.ids[:, first:].tolist() == [NAMED] * 5
        np.testing.assert_allclose(top.logprobs[:, first:], want, atol=1e-5)
    assert both.top.ids[:, :3].tolist() == every.top.ids[:, :3].tolist()
    # From position 4 on; the first that has any is position 1.
    prompt = looked_up(every.prompt_top, slice(0, size))[3:]
    assert named.prompt_top.ids.tolist() == [NAMED] * (len(PROMPT) - 4)
    np.testing.assert_allclose(named.prompt_top.logprobs, prompt, atol=1e-5)
    assert both.prompt_top is None
