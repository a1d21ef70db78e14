"""Advantages and rewards of mean 0 and deviation 1.

Legend: K sampled tokens of an update, laid end to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.protocol import FloatArray

VARIANCE_EPSILON = 1e-8
MOST_DEVIATIONS = 10.0
"""Normalised rewards are clipped here: early deviations are those of few samples."""


def whiten(values_K: torch.Tensor, counted_K: torch.Tensor | None = None) -> torch.Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-8), float32 [K] -> [K]; 0 where nothing is counted.

    counted_K: bool [K], values that have a part in the statistics; the others become 0. None
    counts all. A single value has no variance, and becomes 0.
    """
    counted_K = torch.ones_like(values_K, dtype=torch.bool) if counted_K is None else counted_K
    counted = values_K[counted_K].double()
    whitened_K = torch.zeros_like(values_K)
    if len(counted) > 1:
        deviation = (counted.var() + VARIANCE_EPSILON).sqrt()
        whitened_K[counted_K] = ((counted - counted.mean()) / deviation).to(values_K.dtype)
    return whitened_K


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and spread of all values seen so far, float64; what a checkpoint keeps of them.

    squares: sum of the squared distances to the mean. Two sets are joined by the formula of
    T. Chan, G. Golub and R. LeVeque (1979).
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, values: Sequence[float] | np.ndarray) -> Moments:
        """The moments with these values among them."""
        new = np.asarray(values, dtype=np.float64)
        if not len(new):
            return self
        count, mean = self.count + len(new), float(new.mean())
        apart = mean - self.mean
        squares = float(np.square(new - mean).sum())
        return Moments(
            count=count,
            mean=self.mean + apart * len(new) / count,
            squares=self.squares + squares + apart * apart * self.count * len(new) / count,
        )

    @property
    def tells(self) -> bool:
        """Whether two values have differed: there is no spread before."""
        return self.count > 1 and self.squares > 0

    @property
    def deviation(self) -> float:
        """Unbiased standard deviation."""
        return math.sqrt(self.squares / (self.count - 1) + VARIANCE_EPSILON)

    def normalised(self, value: float) -> float:
        """(value - mean) / standard deviation, clipped to +-10; 0 before two values differ."""
        if not self.tells:
            return 0.0
        units = (value - self.mean) / self.deviation
        return min(max(units, -MOST_DEVIATIONS), MOST_DEVIATIONS)

    def in_units(self, values_L: FloatArray) -> FloatArray:
        """float32 [L] as deviations from the mean, in standard deviations, not clipped; as they are
        before two values differ."""
        if not self.tells:
            return values_L
        return ((values_L - self.mean) / self.deviation).astype(np.float32)

    def from_units(self, units_L: FloatArray) -> FloatArray:
        """Inverse of `in_units`."""
        if not self.tells:
            return units_L
        return (units_L * self.deviation + self.mean).astype(np.float32)
