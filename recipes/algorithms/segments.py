"""Per-sequence sums of flat token tensors.

Legend: K response tokens of all sequences laid end to end, N sequences.
"""

from __future__ import annotations

import torch


def segment_sum(values_K: torch.Tensor, sequence_K: torch.Tensor, num: int) -> torch.Tensor:
    """Sum of the values of each sequence; sequence_K int64 in [0, num). Returns [num]."""
    return values_K.new_zeros(num).index_add(0, sequence_K, values_K)


def segment_mean(values_K: torch.Tensor, sequence_K: torch.Tensor, num: int) -> torch.Tensor:
    """Mean of the values of each sequence, 0 for one without tokens. Returns [num]."""
    counts_N = segment_sum(torch.ones_like(values_K), sequence_K, num)
    return segment_sum(values_K, sequence_K, num) / counts_N.clamp(min=1)
