"""Steps that no graph serves, kernel by kernel, in two parts: the forward pass, and the sampling,
which may have to wait for masks.

Legend: R rows of the batch, T tokens of the step, S rows that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from msgspec.structs import replace

from engine.attention.base import AttentionBackend
from engine.attention.spoilt import spoilt_rows
from engine.batch import RequestTable, StepBatch, build_batch
from engine.kv.route_pool import RoutePool
from engine.mask_table import RowMasks
from engine.models.build import Model
from engine.pending import PendingStep, Sample, pack_sampled
from engine.prompt_logprobs import PromptScorer
from engine.prompt_pooling import Pooled, PromptPooler
from engine.protocol import NewRow, PromptLogprobs, StepPlan
from engine.sampling import Sampler
from engine.speculative.resolve import as_runs, resolve
from engine.transfer import Fetch


@dataclass(frozen=True)
class _Computed:
    """A step whose forward pass is queued. hidden_TH: behind the last layer. prompt: the scores of
    prompt tokens. pooled: the embeddings that it completes."""

    plan: StepPlan
    batch: StepBatch
    hidden_TH: torch.Tensor
    prompt: list[PromptLogprobs]
    pooled: Pooled | None


class EagerSteps:
    """Runs the model over rows of any kind."""

    def __init__(
        self,
        model: Model,
        table: RequestTable,
        sampler: Sampler,
        scorer: PromptScorer,
        attention: AttentionBackend,
        routes: RoutePool | None = None,
    ) -> None:
        self._model = model
        self._table = table
        self._sampler = sampler
        self._scorer = scorer
        self._attention = attention
        self._routes = routes
        self._pooler = PromptPooler()

    def enter(self, rows: Sequence[NewRow]) -> None:
        """Note what the rows that enter a slot want of their prompts."""
        self._scorer.enter(rows)
        self._pooler.enter(rows)

    def forward(self, plan: StepPlan) -> Sample:
        """Queue the forward pass of a plan that verifies no drafts, whose changes the tables have;
        what queues its sampling."""
        if not len(plan.draft_lens):
            return partial(self._sample, self._run(plan))
        resolved = resolve(plan, self._table)
        if not resolved.kept_R.any():
            return lambda _: as_runs(PendingStep(plan.step), plan, resolved.kept_R)
        computed = self._run(resolved.plan)

        def sample(masks: RowMasks | None) -> PendingStep:
            own = None if masks is None else resolved.masks(masks, plan)
            return as_runs(self._sample(computed, own), plan, resolved.kept_R)

        return sample

    def _run(self, plan: StepPlan) -> _Computed:
        """The forward pass of rows whose lengths are those of the plan."""
        batch = build_batch(plan, self._table, self._attention, self._routes)
        hidden_TH = self._model(batch.input_ids_T, batch.context)
        prompt = self._scorer.score(plan, batch, hidden_TH)
        spoilt_R = spoilt_rows(batch.context.step)
        if spoilt_R is not None:
            # The logits of these rows may look finite: attention read zeros where NaN had been.
            hidden_TH[torch.from_numpy(np.repeat(spoilt_R, plan.query_lens))] = float("nan")
            prompt = [_as_nan(part) if spoilt_R[part.row] else part for part in prompt]
        return _Computed(plan, batch, hidden_TH, prompt, self._pooler.pool(plan, batch, hidden_TH))

    def _sample(self, computed: _Computed, masks: RowMasks | None) -> PendingStep:
        plan, batch = computed.plan, computed.batch
        prompt, pooled = computed.prompt, computed.pooled
        slots = plan.slots[plan.samples]
        if len(slots) == 0:
            return PendingStep(plan.step, prompt=prompt, pooled=pooled)
        hidden_SH = computed.hidden_TH[batch.last_T_of_S]
        if self._model.config.num_labels:
            scores = Fetch(self._model.compute_logits(hidden_SH))
            return PendingStep(plan.step, scores=scores, num_rows=len(slots), prompt=prompt)
        # As wide as in a captured step unless the logits change: both then sum alike.
        widen = self._table.device.type == "cpu" or self._sampler.edits(slots)
        logits_SV = self._model.compute_logits(hidden_SH, widen=widen)
        drawn = self._sampler.draw(logits_SV, batch, slots, self._table, masks)
        self._table.append(batch.slots_S, batch.kv_lens_S, drawn.token_S)
        fetch = Fetch(pack_sampled(drawn.token_S, drawn.logprob_S, drawn.entropy_S))
        return PendingStep(
            plan.step, fetch, num_rows=len(slots), top=drawn.top, prompt=prompt, pooled=pooled
        )


def _as_nan(part: PromptLogprobs) -> PromptLogprobs:
    return replace(part, logprobs=np.full_like(part.logprobs, np.nan))
