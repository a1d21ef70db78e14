"""Which steps may have to build something before they run, and so may take longer.

Kernels are compiled and graphs captured when a step first needs them: for a number of rows, for
the drafts that it verifies, and for what its rows ask of sampling.
"""

from __future__ import annotations

from engine.protocol import NewRow, StepPlan

StepKind = frozenset[tuple[int, int, int, int, bool]]


class StepKinds:
    """The kinds of step that have been launched before."""

    def __init__(self) -> None:
        self._seen: StepKind = frozenset()

    def of(self, plan: StepPlan) -> StepKind:
        """The kind of a step, for each copy of the model: which; its rows, to a power of two; most
        drafts of one, -1 where lengths are known; what its new rows bring, or 0; and whether its
        sampling waits for masks."""
        return frozenset((copy, *_kind(own)) for copy, own in enumerate(plan.copies()))

    def is_new(self, kind: StepKind) -> bool:
        """Whether some copy has launched no step of the kind to its end."""
        return not kind <= self._seen

    def launched(self, kind: StepKind) -> None:
        """A step of the kind was launched."""
        if self.is_new(kind):
            self._seen |= kind


def _kind(plan: StepPlan) -> tuple[int, int, int, bool]:
    brings = 0
    for row in plan.new_rows:
        brings |= _brings(row)
    drafts = int(plan.draft_lens.max(initial=-1))
    return len(plan.slots).bit_length(), drafts, brings, len(plan.masked) > 0


def _brings(row: NewRow) -> int:
    """Bits for what a row takes code for that others do without."""
    s = row.sampling
    wants = (
        True,
        s.temperature > 0,
        s.top_k > 0 or s.top_p < 1 or s.min_p > 0,
        bool(s.frequency_penalty or s.presence_penalty or s.repetition_penalty != 1),
        bool(s.logit_bias or s.banned_ids),
        s.num_alternatives > 0,
        s.entropy,
        row.prompt_logprob_start >= 0,
        row.pooling is not None,
    )
    return sum(1 << bit for bit, wanted in enumerate(wants) if wanted)
