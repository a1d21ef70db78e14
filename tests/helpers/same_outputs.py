"""Outputs of two ways to sample one thing, compared as far as float32 can say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.protocol import Request, RequestOutput
from tests.helpers.near_edges import on_an_edge


class SameOutputs:
    """Compares outputs with those of plain decoding, and counts what rounding excuses."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.num_tokens = self.num_excused = 0

    def same(self, requests: Sequence[Request], got: dict[str, Any], want: dict[str, Any]) -> None:
        """Equal tokens, ends and logprobs, as far as float32 can say."""
        assert got.keys() == want.keys() == {one.rid for one in requests}
        for one in requests:
            self._check(one, got[one.rid], want[one.rid])
        # At most one in 10,000 tokens.
        assert self.num_excused <= -(-self.num_tokens // 10_000)

    def _check(self, asked: Request, got: RequestOutput, want: RequestOutput) -> None:
        self.num_tokens += len(want.token_ids)
        size = min(len(got.token_ids), len(want.token_ids))
        other = np.flatnonzero(got.token_ids[:size] != want.token_ids[:size])
        if len(other):
            first = int(other[0])
            told = f"{asked.rid} differs at {first}"
            assert on_an_edge(self._model, asked, want.token_ids[:first].tolist()), told
            self.num_excused += 1
            return
        assert got.token_ids.tolist() == want.token_ids.tolist(), asked.rid
        assert got.finish == want.finish, asked.rid
        atol = logprob_noise(asked.sampling.temperature)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=atol, err_msg=asked.rid)


def logprob_noise(temperature: float) -> float:
    """What sums in another order may do to a float32 logprob, on any processor: logits are off by
    some units of their last place, and a temperature below 1 divides that too."""
    return 2e-5 / min(temperature, 1.0) if temperature > 1e-6 else 2e-5
