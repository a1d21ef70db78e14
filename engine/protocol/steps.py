"""Leader to ranks: one step as changes to device tables, and its result."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from engine.protocol.requests import TopLogprobs
from engine.protocol.routes import ExpertFacts, RouteArray, RouteRead
from engine.protocol.types import (
    Bias,
    BitArray,
    Count,
    Float32,
    FloatArray,
    Int32,
    Int64,
    IntArray,
    Penalty,
    Pooling,
    Size,
)

NO_INTS: IntArray = np.empty(0, np.int32)


class EngineFacts(Struct, frozen=True, kw_only=True):
    """What the ranks resolved at start-up; constant for the life of the replica.

    architecture, model_type: as in config.json, "" where nothing says. releases: memory can be
    given back and taken again. num_labels: scores that a classifier gives a sequence; 0 of a model
    that generates. labels: their names. hidden_size: of a hidden state, and so of an embedding.
    collectives: how the ranks reach each other, and where it is not the fastest way why not.
    experts: None of a dense model. keeps_routes: routes are kept beside KV, to be returned.
    """

    model: str
    num_pages: Count
    page_size: Count
    context_length: Count
    vocab_size: Count
    eos_ids: list[int]
    dtype: str
    device: str
    attention: str
    num_parameters: Size = 0
    load_seconds: float = 0.0
    tp_size: Count = 1
    dp_size: Count = 1
    architecture: str = ""
    model_type: str = ""
    releases: bool = False
    num_labels: Count = 0
    labels: list[str] = msgspec.field(default_factory=list)
    hidden_size: Count = 0
    collectives: str = ""
    experts: ExpertFacts | None = None
    keeps_routes: bool = False


class RowSampling(Struct, frozen=True, kw_only=True):
    """Sampling state a rank keeps for one slot. `banned_ids` cannot be drawn while fewer
    than `min_new_tokens` were. masked_law: `Request.logprob_law` is "masked"."""

    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    frequency_penalty: Penalty
    presence_penalty: Penalty
    repetition_penalty: Float32
    logit_bias: dict[Int32, Bias]
    seed: Int64
    min_new_tokens: Int32
    banned_ids: list[Int32]
    top_logprobs: Count
    entropy: bool = False
    logprob_ids: list[Int32] = msgspec.field(default_factory=list)
    masked_law: bool = False

    @property
    def num_alternatives(self) -> int:
        """As `Request.num_alternatives`."""
        return self.top_logprobs + len(self.logprob_ids)


class NewRow(Struct, frozen=True, kw_only=True):
    """A sequence enters `slot`. token_ids: int32, every token known so far (prompt, and
    outputs already sampled if it was retracted before); `prompt_len` of them are prompt.
    prompt_logprob_start: as in `Request`; -1 once they were returned.
    limit: known tokens, the prompt's among them, at which the sequence ends whatever is sampled:
        a rank samples none beyond it, since the leader may not know yet how many there are.
    forced_acceptance: probability with which each draft counts as accepted, whatever the model
        would have drawn: a tool of benchmarks, whose tokens mean nothing. Below 0: off.
    pooling: as in `Request`, of a sequence that is embedded: it samples nothing, and its embedding
        comes with the step that computes the last token of its prompt. None of any other."""

    slot: Count
    token_ids: IntArray
    prompt_len: Count
    sampling: RowSampling
    prompt_logprob_start: Int32 = -1
    limit: Int32 = 2**31 - 1
    forced_acceptance: Float32 = -1.0
    pooling: Pooling | None = None


class HistoryWrite(Struct, frozen=True):
    """Tokens [start, stop) of the sequence in `slot`, which is about to leave it, become segment
    `segment` of the history, at its places [at, at + stop - start)."""

    slot: Count
    start: Count
    stop: Count
    segment: Count
    at: Count


class DraftSources(Struct, frozen=True, kw_only=True):
    """Where drafts may be copied from, as changes to the ranks' tables: sources[slot, column] is
    another slot, whose tokens so far are read; or -2 - s for segment s of the history; or -1.

    writes: applied before `StepPlan.new_rows`, while the slots still hold who leaves.
    slots, columns, ids: int32 [U], applied in order after `writes`.
    """

    writes: list[HistoryWrite] = msgspec.field(default_factory=list)
    slots: IntArray
    columns: IntArray
    ids: IntArray


class StepPlan(Struct, frozen=True, kw_only=True, tag="step"):
    """One step, as changes to the ranks' tables. Applied in this order: `route_reads`, `sources`,
    `new_rows`, page table writes, page copies, then the forward pass over `slots`.

    route_reads: of sequences that have left their pages, which this step may write.
    page_slots, page_columns, page_ids: int32 [U]; page_table[slot, column] = page id.
    copy_src, copy_dst: int32 [C]; copy-on-write of partly filled pages.
    slots: int32 [R], rows of the batch in order; samples of a group are adjacent.
    query_lens: int32 [R], tokens of each row computed in this step.
    kv_lens: int32 [R], tokens of each row in the KV cache once the step is done; so a row
        computes its tokens [kv_len - query_len, kv_len).
    samples: bool [R], rows whose last token's logits are wanted: they give a new token, or are
        the scores themselves where the model is a classifier.
    draft_lens: int32 [R], most tokens that are drafted for each row and verified with it; 0 in a
        row that does not sample. Empty: none, and every length is known.
    sources: what drafts are copied from; None: as it was.
    masked: int32 [M], ascending, indices into the S rows that sample: rows that may not be sampled
        before their masks are there. Where there are any, the forward pass of the step runs, and
        the sampling of all its rows waits for one `StepMasks`, which comes before any other plan
        or command; another plan in its place says that the step was given up.

    How many drafts a step accepts is known to the ranks before it is known to the leader, which
    plans ahead with bounds. With `draft_lens`, a sampling row has `kv_lens` or fewer tokens in the
    KV cache before its drafts; the rank knows how many: all of its known tokens. One that has
    reached its `NewRow.limit` samples nothing. The pages of a row hold `kv_lens + draft_lens`
    tokens, or as many as its limit lets it have.

    Of a replica with several copies of the model (`ParallelConfig.dp_size`), one frame has a plan
    for the ranks of each: this one is of copy 0.
    further: those of copies 1, 2, and so on, of the same step. One without rows is a step all the
        same: its ranks handle it, and its result has no more than routes. Every rank gets all of
        them, so that what ranks of several copies compute together can be decided from the frame
        alone.
    """

    step: Size
    new_rows: list[NewRow]
    page_slots: IntArray
    page_columns: IntArray
    page_ids: IntArray
    copy_src: IntArray
    copy_dst: IntArray
    slots: IntArray
    query_lens: IntArray
    kv_lens: IntArray
    samples: np.ndarray[Any, np.dtype[np.bool_]]
    draft_lens: IntArray = msgspec.field(default_factory=lambda: NO_INTS)
    sources: DraftSources | None = None
    masked: IntArray = msgspec.field(default_factory=lambda: NO_INTS)
    route_reads: list[RouteRead] = msgspec.field(default_factory=list)
    further: list[StepPlan] = msgspec.field(default_factory=list)

    @property
    def waits(self) -> bool:
        """Whether the sampling of some copy waits for masks."""
        return len(self.masked) > 0 or any(len(plan.masked) for plan in self.further)

    def copies(self) -> list[StepPlan]:
        """The plan of each copy, this one first."""
        return [self, *self.further]


class StepMasks(Struct, frozen=True, kw_only=True, tag="masks"):
    """Which tokens may be sampled in the rows of a step that wait for it (`StepPlan.masked`).

    Every rank keeps a table of masks, which lasts from step to step, so that a mask that many rows
    or steps have comes once. Before the draw, `bits` are written into it at `new`.

    rows: int32 [M], ascending, of those that `masked` names. One that is left out is sampled
        without a mask.
    places: int32 [M], where in the table the mask of each row stands; rows may share one.
    new: int32 [N], places that are written to, each once.
    bits: uint32 [N, ceil(vocabulary / 32)], `types.BitArray`: 1 where the token may be sampled.
        No row is all 0, and bits beyond the vocabulary are not looked at.

    further: of copies 1, 2, and so on, as in `StepPlan`, whose ranks have tables of their own; no
    rows where none waits.

    Example: with a vocabulary of 40, a mask that allows tokens 1 and 33 has the bits [2, 2].
    """

    step: Size
    rows: IntArray
    places: IntArray
    new: IntArray
    bits: BitArray
    further: list[StepMasks] = msgspec.field(default_factory=list)


class PromptLogprobs(Struct, frozen=True):
    """Logprobs of a row's prompt tokens [start, start + n) computed in one step.

    logprobs: float32 [n]; top: the alternatives at each of these positions, if asked."""

    row: Count
    start: Count
    logprobs: FloatArray
    top: TopLogprobs | None = None


class PromptEmbedding(Struct, frozen=True):
    """The embedding of a row's prompt, float32 [hidden_size], once all of it is computed."""

    row: Count
    values: FloatArray


class StepResult(Struct, frozen=True, kw_only=True, tag="step_result"):
    """What one step sampled, for the S rows of the plan with `samples` set, in row order.

    token_ids: int32 [S]; logprobs: float32 [S].
        A row whose logits are not finite has a logprob that is not, and some valid id.
    top: int32 and float32 [T, k] with k the largest `num_alternatives` among the S rows; what is
        behind a row's own says nothing.
    top_rows: int32 [T], ascending, the rows of the S that `top` speaks of; None for all.
    entropies: float32 [S], of rows that did not ask too; None if none of the S rows asked.
    scores: float32 [S, num_labels] of a classifier, which samples nothing: `token_ids` is empty.
        None of a model that generates, and where S is 0.
    counts: int32 [S], tokens that each row got in a step with `StepPlan.draft_lens`: 0 to its
        draft length and 1. `token_ids`, `logprobs` and `entropies` are then of all of them, row
        after row. None: one each.
    drafted: int32 [S], tokens that were drafted for each row, of which one less than its count
        were accepted; None as `counts`.
    embeddings: of the rows whose prompts are embedded and end with this step.
    routes: of `StepPlan.route_reads`, one read behind the other, [P, layers with experts, K]; None
        where the plan reads none.
    further: of copies 1, 2, and so on, as in `StepPlan`.
    """

    step: Size
    token_ids: IntArray
    logprobs: FloatArray
    top: TopLogprobs | None = None
    top_rows: IntArray | None = None
    prompt: list[PromptLogprobs] = msgspec.field(default_factory=list)
    entropies: FloatArray | None = None
    scores: FloatArray | None = None
    counts: IntArray | None = None
    drafted: IntArray | None = None
    embeddings: list[PromptEmbedding] = msgspec.field(default_factory=list)
    routes: RouteArray | None = None
    further: list[StepResult] = msgspec.field(default_factory=list)
