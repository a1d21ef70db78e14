"""A step that is queued on the device, and its result once somebody asks.

Legend: S rows that sample, V tokens drawn for them, k likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from engine.kv.route_pool import ReadRoutes
from engine.mask_table import MaskTable, RowMasks
from engine.prompt_pooling import Pooled
from engine.protocol import PromptLogprobs, StepMasks, StepResult
from engine.sampling import Top, to_top
from engine.transfer import Fetch


@dataclass(frozen=True)
class Runs:
    """Tokens of rows that verified drafts. starts_S: int64, where each row's tokens begin among
    those drawn, on the host. counts: int32 [2, >= S], tokens that count, and drafts there were."""

    starts_S: np.ndarray
    counts: Fetch


@dataclass(frozen=True)
class PendingStep:
    """sampled: int32 [2 or 3, >= S] as `pack_sampled` lays it out; None where no row samples.
    num_rows: S. top: of the rows that asked. scores: float32 [>= S, labels], by a classifier,
    which samples nothing. runs: where rows got several tokens or none, with `sampled` of all that
    were drawn, [2 or 3, V]. pooled: embeddings that the step completes. routes: of sequences that
    had left their pages."""

    step: int
    sampled: Fetch | None = None
    num_rows: int = 0
    top: Top | None = None
    prompt: list[PromptLogprobs] = field(default_factory=list)
    scores: Fetch | None = None
    runs: Runs | None = None
    pooled: Pooled | None = None
    routes: ReadRoutes | None = None

    def with_routes(self, routes: ReadRoutes) -> PendingStep:
        """The step, with what it read before it wrote anything."""
        return replace(self, routes=routes)

    def result(self) -> StepResult:
        """Wait for the step and return what it sampled."""
        if self.sampled is None:
            sampled = np.zeros((2, 0), np.int32)
        else:
            sampled = self.sampled.numpy()
            if self.runs is None:
                sampled = sampled[:, : self.num_rows]
        counts = drafted = None
        if self.runs is not None:
            counts, drafted = self.runs.counts.numpy()[:, : self.num_rows]
            sampled = sampled[:, _places(self.runs.starts_S, counts)]
        values = sampled[1:].view(np.float32)
        return StepResult(
            step=self.step,
            token_ids=sampled[0],
            logprobs=values[0],
            entropies=values[1] if len(values) > 1 else None,
            top=None if self.top is None else to_top(self.top.ids, self.top.logprobs),
            top_rows=None if self.top is None else self.top.rows,
            prompt=self.prompt,
            scores=None if self.scores is None else self.scores.numpy()[: self.num_rows],
            counts=counts,
            drafted=drafted,
            embeddings=[] if self.pooled is None else self.pooled.embeddings(),
            routes=None if self.routes is None else self.routes.numpy(),
        )


Sample = Callable[[RowMasks | None], PendingStep]
"""Queues the sampling of a step whose forward pass is queued, its masked rows by these masks."""


class MaskedStep:
    """A step whose sampling waits for masks, which go into `table` first."""

    def __init__(self, step: int, sample: Sample, table: MaskTable) -> None:
        self._step = step
        self._table = table
        self._sample: Sample | None = sample
        self._sampled: PendingStep | None = None
        self._routes: ReadRoutes | None = None

    def with_routes(self, routes: ReadRoutes) -> MaskedStep:
        """As `PendingStep.with_routes`."""
        self._routes = routes
        return self

    def mask(self, masks: StepMasks) -> None:
        """Queue the sampling, once."""
        assert masks.step == self._step, f"masks of step {masks.step} came for {self._step}"
        sample, self._sample = self._sample, None
        assert sample is not None, f"masks of step {masks.step} came twice"
        self._sampled = replace(sample(self._table.enter(masks)), routes=self._routes)

    def result(self) -> StepResult:
        """As `PendingStep.result`, for when the masks came."""
        assert self._sampled is not None, f"the masks of step {self._step} have not come"
        return self._sampled.result()


LaunchedStep = PendingStep | MaskedStep


def pack_sampled(
    token_S: torch.Tensor, logprob_S: torch.Tensor, entropy_S: torch.Tensor | None = None
) -> torch.Tensor:
    """Token ids and the bits of float32 logprobs and, if given, entropies: int32 [2, S] or
    [3, S], so that one copy brings all."""
    values = [logprob_S] if entropy_S is None else [logprob_S, entropy_S]
    return torch.stack([token_S.to(torch.int32), *(value.view(torch.int32) for value in values)])


def _places(starts_S: np.ndarray, counts_S: np.ndarray) -> np.ndarray:
    """Indices of the tokens that count, row after row."""
    ends = np.cumsum(counts_S)
    first = np.repeat(starts_S - (ends - counts_S), counts_S)
    places: np.ndarray = first + np.arange(len(first))
    return places
