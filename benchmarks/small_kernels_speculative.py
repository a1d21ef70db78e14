"""The kernels around a verifying step in time: n-gram drafting, virtual rows, acceptance.

R rows, K drafts of a row, M sources of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from small_kernels_products import time_us

from kernels.backend import KernelBackend
from kernels.speculative.accept import accept
from kernels.speculative.ngram import propose
from kernels.speculative.rows import VirtualRows, virtual_rows

ROWS = (1, 4, 16, 64, 256)
GROUP, SOURCES, DRAFTS = 8, 16, 3
TOKENS, CONTEXT, PAGE_SIZE = 4096, 6144, 16
PHRASES, VOCAB = 3000, 150_000
CACHE_BYTES = 100 << 20
"""Above any L2 cache: a model's weights pass through it between two steps."""


class Batch:
    """Rows of TOKENS tokens in groups of GROUP, whose members read each other and as many segments
    of the history as make SOURCES."""

    def __init__(self, rows: int, seed: int, device: str = "cuda") -> None:
        rng = np.random.default_rng(seed)
        own = max(SOURCES - min(rows, GROUP) + 1, 0)
        groups = -(-rows // GROUP)
        text = _text(rng, (rows + 1 + groups * own) * TOKENS).to(device)
        self.rows, self.device = rows, torch.device(device)
        self.token_ids = torch.zeros(rows + 1, CONTEXT, dtype=torch.int32, device=device)
        self.token_ids[:rows, :TOKENS] = text[: rows * TOKENS].view(rows, TOKENS)
        self.history = text[(rows + 1) * TOKENS :].clone()
        places = np.arange(groups * own) * TOKENS
        self.segments = _ints(np.stack((places, np.full_like(places, TOKENS)), axis=1), device)
        self.sources = _ints([_sources(row, rows, own) for row in range(rows + 1)], device)
        self.slots = _ints(range(rows), device)
        self.draft_lens = _ints([DRAFTS] * rows, device)
        self.drafts = _ints(np.zeros((rows, DRAFTS)), device)
        self.drafted, self.counts = _ints([0] * rows, device), _ints([0] * rows, device)
        self.limit = _ints([CONTEXT] * rows + [0], device)
        self.forced = torch.full((rows + 1,), -1.0, device=device)
        pages = np.arange((rows + 1) * (CONTEXT // PAGE_SIZE)).reshape(rows + 1, -1)
        self.page_table = _ints(pages, device)
        self.virtual = VirtualRows.empty(rows * (DRAFTS + 1), self.device)
        self.tokens = torch.zeros(rows, DRAFTS + 1, dtype=torch.int64, device=device)
        self.length = _ints([TOKENS] * rows + [0], device)

    @property
    def bytes(self) -> int:
        """Of the texts."""
        return 4 * (self.token_ids.numel() + self.history.numel())

    def propose(self, backend: KernelBackend = "triton") -> None:
        """N-gram drafts of all rows."""
        propose(
            self.slots,
            self.draft_lens,
            length=self.length,
            limit=self.limit,
            forced=self.forced,
            token_ids=self.token_ids,
            sources=self.sources,
            history=self.history,
            segments=self.segments,
            drafts_RK=self.drafts,
            drafted_R=self.drafted,
            backend=backend,
        )

    def lay_out(self) -> None:
        """The virtual rows of the drafts there are."""
        virtual_rows(
            self.slots,
            self.drafts,
            self.drafted,
            length=self.length,
            limit=self.limit,
            token_ids=self.token_ids,
            page_table=self.page_table,
            page_size=PAGE_SIZE,
            scratch_slot=self.rows,
            out=self.virtual,
            backend="triton",
        )

    def accept(self) -> None:
        """Append what came: rows grow with each call, up to the context."""
        accept(
            self.tokens.view(-1),
            self.slots,
            self.drafts,
            self.drafted,
            length=self.length,
            limit=self.limit,
            forced=self.forced,
            token_ids=self.token_ids,
            counts_R=self.counts,
            backend="triton",
        )


def table() -> list[dict[str, Any]]:
    """Microseconds of each kernel by rows, after a comparison of the drafts with the reference."""
    out = []
    print(f"{TOKENS} tokens, {SOURCES} sources, {DRAFTS} drafts")
    print(f"{'rows':>6}{'drafted':>9}{'propose':>9}{'rows':>7}{'accept':>8}")
    for rows in ROWS:
        first = Batch(rows, 0)
        share = _check(first)
        copies = max(2, min(40, CACHE_BYTES // first.bytes))
        batches = [first, *(Batch(rows, seed) for seed in range(1, copies))]
        times = {name: _us(batches, name) for name in ("propose", "lay_out", "accept")}
        print(f"{rows:>6}{share:9.2f}{times['propose']:9.2f}", end="")
        print(f"{times['lay_out']:7.2f}{times['accept']:8.2f}")
        out.append({"rows": rows, "drafted": share, **times})
    return out


def _us(batches: list[Batch], name: str) -> float:
    calls: list[Callable[[], Any]] = [getattr(batch, name) for batch in batches]
    return time_us(calls * (1 if len(calls) > 8 else 4))


def _check(batch: Batch) -> float:
    """Share of the drafts asked for that are found; half of them come true."""
    host = Batch(batch.rows, 0, "cpu")
    host.propose("torch")
    batch.propose()
    assert torch.equal(batch.drafts.cpu(), host.drafts), "drafts are not the reference's"
    assert torch.equal(batch.drafted.cpu(), host.drafted), "as many drafts as the reference's"
    batch.tokens[::2, :DRAFTS] = batch.drafts[::2].long()
    return float(batch.drafted.double().mean()) / DRAFTS


def _sources(row: int, rows: int, own: int) -> list[int]:
    group = row // GROUP
    members = [slot for slot in range(group * GROUP, min(rows, (group + 1) * GROUP)) if slot != row]
    listed = [*members, *(-2 - group * own - nth for nth in range(own))] if row < rows else []
    return (listed + [-1] * SOURCES)[:SOURCES]


def _text(rng: np.random.Generator, size: int) -> torch.Tensor:
    """Phrases of 2 to 12 tokens, drawn as words are: a few often, many seldom."""
    starts = rng.integers(0, VOCAB, PHRASES)
    lengths = rng.integers(2, 13, PHRASES)
    weights = 1 / np.arange(3, PHRASES + 3)
    drawn = rng.choice(PHRASES, size // 2, p=weights / weights.sum())
    nth = np.arange(lengths[drawn].sum()) - np.repeat(
        np.cumsum(lengths[drawn]) - lengths[drawn], lengths[drawn]
    )
    tokens = np.repeat(starts[drawn], lengths[drawn]) + 7 * nth
    return torch.from_numpy((tokens[:size] % VOCAB).astype(np.int32))


def _ints(values: Any, device: str) -> torch.Tensor:
    return torch.tensor(np.array(values), dtype=torch.int32, device=device)
