"""How token losses become one number: a weight for each sequence's tokens.

Every aggregation in use is sum_i w_i sum_t loss_it, with w_i fixed by the response lengths of the
whole update. So the weights are computed once over the update, and micro-batches simply add up.
Names are verl's. Legend: N sequences.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from engine.protocol import FloatArray

LossAggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]


def token_weights(lengths: list[int], aggregation: LossAggregation, max_length: int) -> FloatArray:
    """Weight of a token of each sequence, float32 [N]. A sequence of length 0 has none, and is not
    counted in N.

    token-mean: 1 / total tokens (DAPO, arXiv 2503.14476).
    seq-mean-token-mean: 1 / (N * length) (GRPO, arXiv 2402.03300).
    seq-mean-token-sum: 1 / N (RLOO, arXiv 2402.14740).
    seq-mean-token-sum-norm: 1 / (N * max_length), a constant (Dr.GRPO, arXiv 2503.20783).

    Raises ValueError for another name.
    """
    num = max(sum(length > 0 for length in lengths), 1)
    lengths_N = np.maximum(np.asarray(lengths, dtype=np.float64), 1)
    if aggregation == "token-mean":
        weights_N = np.full(len(lengths), 1 / max(sum(lengths), 1))
    elif aggregation == "seq-mean-token-mean":
        weights_N = 1 / (num * lengths_N)
    elif aggregation == "seq-mean-token-sum":
        weights_N = np.full(len(lengths), 1 / num)
    elif aggregation == "seq-mean-token-sum-norm":
        weights_N = np.full(len(lengths), 1 / (num * max_length))
    else:
        raise ValueError(f"unknown loss aggregation {aggregation!r}")
    return weights_N.astype(np.float32)
