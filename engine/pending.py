"""A step that is queued on the device, and its result once somebody asks.

Legend: S rows that sample, k likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine.protocol import PromptLogprobs, StepResult
from engine.sampling import to_top
from engine.transfer import Fetch


@dataclass(frozen=True)
class PendingStep:
    """sampled: int32 [2, >= S], token ids and the bits of their float32 logprobs; None where
    no row samples. num_rows: S. top: (ids, logprobs) [S, k] on the device."""

    step: int
    sampled: Fetch | None = None
    num_rows: int = 0
    top: tuple[torch.Tensor, torch.Tensor] | None = None
    prompt: list[PromptLogprobs] = field(default_factory=list)

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled."""
        if self.sampled is None:
            tokens, logprobs = np.zeros(0, np.int32), np.zeros(0, np.float32)
        else:
            tokens, bits = self.sampled.numpy()[:, : self.num_rows]
            logprobs = bits.view(np.float32)
        return StepResult(
            step=self.step,
            token_ids=tokens,
            logprobs=logprobs,
            top=to_top(self.top) if self.top is not None else None,
            prompt=self.prompt,
        )


def pack_sampled(token_S: torch.Tensor, logprob_S: torch.Tensor) -> torch.Tensor:
    """Token ids and logprobs as one int32 [2, S], so that one copy brings both."""
    return torch.stack([token_S.to(torch.int32), logprob_S.view(torch.int32)])
