"""An executor without a model that knows what every KV slot should hold.

It keeps, for each page and offset, a hash of the token prefix written there and the weight
version that wrote it, and asserts before each "attention" that a row would read exactly its
own prefix. Tokens and logprobs are functions of (seed, position, prefix), so a request must
come out the same however it was scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from engine.protocol import (
    NewRow,
    Pooling,
    PromptEmbedding,
    PromptLogprobs,
    RouteArray,
    RowSampling,
    StepMasks,
    StepPlan,
    StepResult,
    TopLogprobs,
)
from tests.helpers.fake_executor import tokens_of
from tests.helpers.mock_routes import FirstReads, read_routes
from tests.helpers.mock_sources import MockSources
from tests.helpers.sent_masks import SentMasks

MASK = (1 << 61) - 1
EMBEDDING_SIZE = 3


def mix(*values: int) -> int:
    """A deterministic 61-bit hash of integers."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ (value + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
        state ^= state >> 29
    return state & MASK


def prefix_hashes(tokens: list[int]) -> list[int]:
    """The hash of tokens[:i+1] for each i."""
    hashes, state = [], 1
    for token in tokens:
        state = mix(state, token)
        hashes.append(state)
    return hashes


def logprob(prefix: int, token: int) -> float:
    """The logprob this model gives `token` after a prefix."""
    return float(np.float32(-(mix(prefix, token, 3) % 4096) / 1024))


def entropy(prefix: int) -> float:
    """The entropy of this model's distribution after a prefix."""
    return float(np.float32(mix(prefix, 7) % 4096 / 1024))


def sample(
    prefix: int,
    position: int,
    sampling: RowSampling,
    vocab: int,
    num_output: int,
    allowed: Container[int] | None = None,
) -> int:
    """The token this model draws at `position` after a prefix. allowed: by its mask, if it has
    one."""
    token = mix(prefix, position, sampling.seed) % vocab
    banned = sampling.banned_ids if num_output < sampling.min_new_tokens else ()
    for _ in range(vocab):
        if token not in banned and (allowed is None or token in allowed):
            return token
        token = (token + 1) % vocab
    raise AssertionError("nothing can be drawn")


def score(prefix: int, num_labels: int) -> list[float]:
    """The scores this model gives a prefix, if it is a classifier."""
    return [
        float(np.float32(mix(prefix, label, 9) % 4096 / 1024 - 2)) for label in range(num_labels)
    ]


def embedding(prompt: list[int], pooling: Pooling) -> list[float]:
    """The embedding this model gives a prompt."""
    states = np.array([score(prefix, EMBEDDING_SIZE) for prefix in prefix_hashes(prompt)])
    found = states[-1] if pooling == "last" else states.mean(0)
    return found.astype(np.float32).tolist()


def top_of(prefix: int, count: int, vocab: int) -> tuple[list[int], list[float]]:
    """`count` token ids and logprobs, as if they were the likeliest."""
    ids = [mix(prefix, rank, 5) % vocab for rank in range(count)]
    return ids, [logprob(prefix, token) for token in ids]


def generate_alone(
    prompt: list[int],
    sampling: RowSampling,
    stop_ids: list[int],
    max_new: int,
    vocab: int,
    mask: Callable[[list[int]], Container[int] | None] = lambda _: None,
) -> tuple[list[int], list[float]]:
    """Tokens and logprobs of a request that has the machine for itself. mask: what may come after
    some output tokens; None for any."""
    tokens, logprobs = list(prompt), []
    state = prefix_hashes(tokens)[-1]
    for count in range(max_new):
        token = sample(state, len(tokens), sampling, vocab, count, mask(tokens[len(prompt) :]))
        logprobs.append(logprob(state, token))
        tokens.append(token)
        state = mix(state, token)
        if token in stop_ids and count >= sampling.min_new_tokens:
            break
    return tokens[len(prompt) :], logprobs


@dataclass
class Row:
    """What a rank's tables hold for one slot."""

    new: NewRow
    version: int
    tokens: list[int]
    hashes: list[int]
    prompt_logprob_start: int
    pages: dict[int, int] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    """Positions whose hidden states came by, of a row that is embedded."""


class MockExecutor:
    """`step` runs one plan; raises AssertionError where a real one would compute nonsense."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        vocab_size: int = 97,
        num_labels: int = 0,
        accepts: Callable[[int, int], bool] = lambda seed, position: (
            mix(seed, position, 11) % 3 > 0
        ),
    ) -> None:
        """num_labels: of a classifier, which scores and samples nothing. accepts: whether the draft
        for a position of the sequence with this seed is what the model draws."""
        self.accepts = accepts
        self.sources = MockSources()
        self.num_drafted = 0
        self.num_inert = 0
        self.num_labels = num_labels
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.version = 0
        self.num_computed = 0
        self.num_copies = 0
        self.num_rowless = 0
        self.batches: list[list[int]] = []
        self.kv_versions: dict[int, list[int]] = {}
        """By seed of a request: the version of each KV entry its last step read."""
        self._first_reads = FirstReads()
        self.kept_seeds: set[int] = set()
        """Of requests that may begin with KV of older versions than they do."""
        self._allowed: dict[int, set[int]] = {}
        self._masks = SentMasks()
        self._kv = np.full((num_pages, page_size, 2), -1, np.int64)
        self._rows: dict[int, Row] = {}
        self._next_step = 0

    def step(self, plan: StepPlan, masks: StepMasks | None = None) -> StepResult:
        """New rows, page table, copies, KV writes of all rows, reads of all rows, sampling."""
        assert plan.step == self._next_step
        self._next_step += 1
        assert (masks is None) == (len(plan.masked) == 0), "masks that nobody or somebody waits for"
        self._allowed = self._allowed_of(plan, masks)
        routes = read_routes(self._kv, plan.route_reads)
        if not len(plan.slots):
            return self._read_alone(plan, routes)
        self._check_shapes(plan)
        if plan.sources is not None:
            self.sources.apply(plan.sources, self._texts)
        for new in plan.new_rows:
            self._rows[new.slot] = self._new_row(new)
        updates = zip(plan.page_slots, plan.page_columns, plan.page_ids, strict=True)
        for slot, column, page in updates:
            self._rows[int(slot)].pages[int(column)] = int(page)
        self._copy(plan)
        self._sure = self._lengths(plan)
        for slot in plan.slots.tolist():
            self.sources.check(slot, self._texts)
        self._write(plan)
        for slot, kv_len in zip(plan.slots.tolist(), self._sure, strict=True):
            if kv_len >= 0:
                self._read(self._rows[slot], kv_len)
        self.num_computed += int(plan.query_lens.sum())
        self.batches.append(plan.slots.tolist())
        prompt = self._prompt_logprobs(plan)
        embeddings = self._embeddings(plan)
        if self.num_labels:
            return self._score(plan)
        run = self._verify if len(plan.draft_lens) else self._sample
        return replace(run(plan, prompt), embeddings=embeddings, routes=routes)

    @property
    def first_read(self) -> dict[int, list[int]]:
        """As `FirstReads.versions`."""
        return self._first_reads.versions

    def _read_alone(self, plan: StepPlan, routes: RouteArray | None) -> StepResult:
        assert routes is not None and not plan.new_rows, "an empty step"
        self.num_rowless += 1
        nothing = np.empty(0, np.int32)
        logprobs = nothing.astype(np.float32)
        return StepResult(step=plan.step, token_ids=nothing, logprobs=logprobs, routes=routes)

    def _embeddings(self, plan: StepPlan) -> list[PromptEmbedding]:
        found = []
        rows = zip(plan.slots.tolist(), plan.query_lens.tolist(), self._sure, strict=True)
        for index, (slot, query_len, kv_len) in enumerate(rows):
            row = self._rows[slot]
            pooling = row.new.pooling
            if pooling is None:
                continue
            assert not plan.samples[index], "a row that is embedded samples"
            row.seen += range(kv_len - query_len, kv_len)
            if kv_len == row.new.prompt_len:
                every = list(range(kv_len))
                assert row.seen == (every if pooling == "mean" else every[-len(row.seen) :])
                values = embedding(row.tokens, pooling)
                found.append(PromptEmbedding(index, np.array(values, np.float32)))
        return found

    def _texts(self, slot: int) -> tuple[list[int], list[int]]:
        """Tokens of the sequence in a slot, and those of its prompt."""
        row = self._rows[slot]
        return row.tokens, row.tokens[: row.new.prompt_len]

    def _lengths(self, plan: StepPlan) -> list[int]:
        """KV of each row once the step is done, drafts left out; -1 of one at its limit."""
        if not len(plan.draft_lens):
            return plan.kv_lens.tolist()
        assert len(plan.draft_lens) == len(plan.slots)
        assert not plan.draft_lens[~plan.samples].any(), "drafts of a row that does not sample"
        lengths = []
        for index, slot in enumerate(plan.slots.tolist()):
            row, kv_len = self._rows[slot], int(plan.kv_lens[index])
            if not plan.samples[index]:
                lengths.append(kv_len)
                continue
            known = len(row.tokens)
            if known >= row.new.limit:
                assert known == row.new.limit
                self.num_inert += 1
                lengths.append(-1)
                continue
            assert known <= kv_len, "the length is out of its bounds"
            pages = set(
                range(
                    -(
                        -min(known + int(plan.draft_lens[index]), row.new.limit - 1)
                        // self.page_size
                    )
                )
            )
            assert pages <= row.pages.keys(), "drafts without pages"
            lengths.append(known)
        return lengths

    def _verify(self, plan: StepPlan, prompt: list[PromptLogprobs]) -> StepResult:
        """As `_sample`, with drafts of which the first some are what the model draws anyway."""
        counts, drafted, runs = [], [], []
        for index in np.flatnonzero(plan.samples).tolist():
            row = self._rows[int(plan.slots[index])]
            if self._sure[index] < 0:
                counts.append(0)
                drafted.append(0)
                continue
            known = len(row.tokens)
            most = min(int(plan.draft_lens[index]), row.new.limit - known - 1)
            run = [self._draw(row)]
            seed = row.new.sampling.seed
            while len(run) <= most and self.accepts(seed, len(row.tokens)):
                place = self._place(row, len(row.tokens) - 1)
                self._kv[place] = (row.hashes[-1], self.version)
                run.append(self._draw(row))
            self._read(row, len(row.tokens) - 1)
            for position in range(len(row.tokens) - 1, known + most):
                self._kv[self._place(row, position)] = (-7, -7)
            counts.append(len(run))
            drafted.append(most)
            runs += run
        self.num_drafted += sum(drafted)
        tokens, logprobs, prefixes = ([item[part] for item in runs] for part in range(3))
        entropies = any(row.new.sampling.entropy for row in self._rows.values())
        tops = self._tops(plan, counts)
        return StepResult(
            step=plan.step,
            token_ids=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            top=tops,
            prompt=prompt,
            entropies=_entropies(prefixes) if entropies else None,
            counts=np.array(counts, np.int32),
            drafted=np.array(drafted, np.int32),
        )

    def _tops(self, plan: StepPlan, counts: list[int]) -> TopLogprobs | None:
        rows = [self._rows[int(slot)] for slot in plan.slots[plan.samples].tolist()]
        count = max((row.new.sampling.top_logprobs for row in rows), default=0)
        if not count:
            return None
        return self._top(
            [row.hashes[-2 if got else -1] for row, got in zip(rows, counts, strict=True)], count
        )

    def _allowed_of(self, plan: StepPlan, masks: StepMasks | None) -> dict[int, set[int]]:
        """What may be sampled in masked slots."""
        if masks is None:
            return {}
        assert masks.step == plan.step and set(masks.rows.tolist()) <= set(plan.masked.tolist())
        slots = plan.slots[plan.samples].tolist()
        found = self._masks.enter(masks).items()
        return {slots[row]: set(tokens_of(bits)) for row, bits in found}

    def _draw(self, row: Row) -> tuple[int, float, int]:
        """The next token of a row, which it then knows; its logprob and prefix."""
        prefix, known = row.hashes[-1], len(row.tokens)
        sampling = row.new.sampling
        num_output, allowed = known - row.new.prompt_len, self._allowed.get(row.new.slot)
        token = sample(prefix, known, sampling, self.vocab_size, num_output, allowed)
        row.tokens.append(token)
        row.hashes.append(mix(prefix, token))
        return token, logprob(prefix, token), prefix

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.pages[position // self.page_size], position % self.page_size

    def _new_row(self, new: NewRow) -> Row:
        tokens = new.token_ids.tolist()
        self._first_reads.enter(new.sampling.seed, len(tokens))
        return Row(new, self.version, tokens, prefix_hashes(tokens), new.prompt_logprob_start)

    def _check_shapes(self, plan: StepPlan) -> None:
        rows = len(plan.slots)
        assert len(set(plan.slots.tolist())) == rows, "a slot twice in one step"
        assert len(plan.query_lens) == len(plan.kv_lens) == len(plan.samples) == rows
        assert (plan.query_lens > 0).all() and (plan.query_lens <= plan.kv_lens).all()
        for array in (plan.slots, plan.query_lens, plan.kv_lens, plan.page_ids, plan.copy_src):
            assert array.dtype == np.int32
        assert plan.samples.dtype == np.bool_

    def _copy(self, plan: StepPlan) -> None:
        assert not set(plan.copy_src.tolist()) & set(plan.copy_dst.tolist())
        assert len(set(plan.copy_dst.tolist())) == len(plan.copy_dst)
        self._kv[plan.copy_dst] = self._kv[plan.copy_src]
        self.num_copies += len(plan.copy_src)

    def _write(self, plan: StepPlan) -> None:
        written: set[tuple[int, int]] = set()
        rows = zip(plan.slots.tolist(), plan.query_lens.tolist(), self._sure, strict=True)
        for slot, query_len, kv_len in rows:
            if kv_len < 0:
                continue
            row = self._rows[slot]
            assert kv_len <= len(row.tokens), "computes a token nobody knows"
            for position in range(kv_len - query_len, kv_len):
                place = (row.pages[position // self.page_size], position % self.page_size)
                assert place not in written, f"two rows write page and offset {place}"
                written.add(place)
                self._kv[place] = (row.hashes[position], self.version)

    def _read(self, row: Row, kv_len: int) -> None:
        versions: list[int] = []
        for position in range(kv_len):
            place = (row.pages[position // self.page_size], position % self.page_size)
            found, version = self._kv[place].tolist()
            assert found == row.hashes[position], f"wrong KV at position {position}, {place}"
            kept = row.new.sampling.seed in self.kept_seeds
            assert kept or version >= row.version, f"KV of version {version} at {position}"
            versions.append(version)
        self.kv_versions[row.new.sampling.seed] = versions
        self._first_reads.read(row.new.sampling.seed, versions)

    def _prompt_logprobs(self, plan: StepPlan) -> list[PromptLogprobs]:
        parts = []
        for index, slot in enumerate(plan.slots.tolist()):
            row = self._rows[slot]
            if row.prompt_logprob_start < 0:
                continue
            first = max(
                row.prompt_logprob_start, int(plan.kv_lens[index] - plan.query_lens[index]) + 1
            )
            end = min(int(plan.kv_lens[index]) + 1, row.new.prompt_len)
            if first >= end:
                continue
            before = [row.hashes[p - 1] for p in range(first, end)]
            values = [logprob(b, row.tokens[first + i]) for i, b in enumerate(before)]
            count = row.new.sampling.top_logprobs
            top = self._top(before, count) if count else None
            parts.append(PromptLogprobs(index, first, np.array(values, np.float32), top))
        return parts

    def _top(self, prefixes: list[int], count: int) -> TopLogprobs:
        tops = [top_of(prefix, count, self.vocab_size) for prefix in prefixes]
        ids = np.array([ids for ids, _ in tops], np.int32).reshape(len(tops), count)
        values = np.array([lps for _, lps in tops], np.float32).reshape(len(tops), count)
        return TopLogprobs(ids, values)

    def _score(self, plan: StepPlan) -> StepResult:
        found = []
        for index in np.flatnonzero(plan.samples).tolist():
            row = self._rows[int(plan.slots[index])]
            assert int(plan.kv_lens[index]) == row.new.prompt_len, "scores before the last token"
            found.append(score(row.hashes[-1], self.num_labels))
        nothing = np.empty(0, np.int32)
        scores = np.array(found, np.float32) if found else None
        return StepResult(
            step=plan.step, token_ids=nothing, logprobs=nothing.astype(np.float32), scores=scores
        )

    def _sample(self, plan: StepPlan, prompt: list[PromptLogprobs]) -> StepResult:
        tokens, logprobs, prefixes, count, with_entropy = [], [], [], 0, False
        for index in np.flatnonzero(plan.samples).tolist():
            row, kv_len = self._rows[int(plan.slots[index])], int(plan.kv_lens[index])
            assert kv_len == len(row.tokens), "samples after a token that is not the last"
            prefix = row.hashes[-1]
            num_output = kv_len - row.new.prompt_len
            allowed = self._allowed.get(row.new.slot)
            token = sample(prefix, kv_len, row.new.sampling, self.vocab_size, num_output, allowed)
            tokens.append(token)
            logprobs.append(logprob(prefix, token))
            prefixes.append(prefix)
            count = max(count, row.new.sampling.top_logprobs)
            with_entropy |= row.new.sampling.entropy
            row.tokens.append(token)
            row.hashes.append(mix(prefix, token))
        return StepResult(
            step=plan.step,
            token_ids=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            top=self._top(prefixes, count) if count else None,
            prompt=prompt,
            entropies=_entropies(prefixes) if with_entropy else None,
        )


def _entropies(prefixes: list[int]) -> np.ndarray:
    return np.array([entropy(prefix) for prefix in prefixes], np.float32)
