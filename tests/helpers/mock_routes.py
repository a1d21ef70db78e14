"""Routes of executors without a model: functions of the KV that lies at a position, so that one of
another token, another prefix or another version of the weights is another route."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from engine.protocol import ExpertFacts, RouteArray, RouteRead, StepPlan, route_dtype

EXPERTS = ExpertFacts(num_layers=3, layers=[1, 2], num_experts=200, top_k=2)
MASK = (1 << 61) - 1


def route_of(prefix: int, version: int, facts: ExpertFacts = EXPERTS) -> RouteArray:
    """The route [layers with experts, K] of a token, by the hash of its prefix and the version that
    computed it."""
    places = range(len(facts.layers) * facts.top_k)
    state = (prefix * 31 + version * 1_000_003) & MASK
    ids = [((state ^ (place * 0x9E3779B1)) * 0xBF58476D1CE4E5B9 >> 23) for place in places]
    found = np.array([value % facts.num_experts for value in ids], route_dtype(facts.num_experts))
    return found.reshape(len(facts.layers), facts.top_k)


def read_routes(
    kv: np.ndarray, reads: Sequence[RouteRead], facts: ExpertFacts = EXPERTS
) -> RouteArray | None:
    """What a step reads. kv: int64 [pages, tokens of a page, 2], prefix hashes and versions."""
    if not reads:
        return None
    rows = []
    for read in reads:
        held = kv[read.pages].reshape(-1, 2)[read.start : read.start + read.count].tolist()
        assert len(held) == read.count > 0, "a read beyond its pages, or of nothing"
        rows += [route_of(prefix, version, facts) for prefix, version in held]
    return np.stack(rows)


def expected_routes(
    prefixes: Sequence[int], versions: Sequence[int], facts: ExpertFacts = EXPERTS
) -> RouteArray:
    """Routes of all layers of positions with these prefix hashes and versions."""
    rows = [route_of(*pair, facts) for pair in zip(prefixes, versions, strict=True)]
    return facts.spread(np.stack(rows) if rows else facts.absent(0))


class FirstReads:
    """By seed of a request: the version that computed each position when it was first attended to,
    of steps whose results counted. One that leaves its slot with tokens that it did not have when
    it entered keeps those; one that leaves without any begins again."""

    def __init__(self) -> None:
        self.versions: dict[int, list[int]] = {}
        self._entered: dict[int, tuple[int, int]] = {}

    def enter(self, seed: int, num_tokens: int) -> None:
        """The sequence takes a slot with so many tokens."""
        before, kept = self._entered.get(seed, (num_tokens, 0))
        if num_tokens != before:
            kept = num_tokens - 1 if num_tokens > before else 0
        self.versions[seed] = self.versions.get(seed, [])[:kept]
        self._entered[seed] = (num_tokens, kept)

    def read(self, seed: int, versions: list[int]) -> None:
        """A row attends to positions of these versions."""
        known = self.versions[seed]
        known += versions[len(known) :]


def sums_of(tokens: Sequence[int]) -> list[int]:
    """A number for each beginning of `tokens`."""
    found, state = [], 1
    for token in tokens:
        state = zlib.crc32(token.to_bytes(4, "little"), state)
        found.append(state)
    return found


def fake_routes(tokens: Sequence[int], version: int = 0) -> RouteArray:
    """Routes of all layers of all of `tokens` but the last, as `PagedRoutes` has them."""
    sums = sums_of(tokens)[:-1]
    return expected_routes(sums, [version] * len(sums))


class PagedRoutes:
    """The pages of a rank, of which each place knows the beginning of a sequence that was written
    there last, and by which version."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._kv = np.full((num_pages, page_size, 2), -1, np.int64)
        self._pages: dict[tuple[int, int], int] = {}

    def step(
        self, plan: StepPlan, rows: Mapping[int, Sequence[int]], version: int
    ) -> RouteArray | None:
        """Read, then take in what a plan changes and writes. rows: the tokens of each slot."""
        routes = read_routes(self._kv, plan.route_reads)
        places = zip(plan.page_slots.tolist(), plan.page_columns.tolist(), strict=True)
        self._pages.update(zip(places, plan.page_ids.tolist(), strict=True))
        self._kv[plan.copy_dst] = self._kv[plan.copy_src]
        computed = zip(plan.slots.tolist(), plan.query_lens.tolist(), plan.kv_lens, strict=True)
        for slot, query_len, kv_len in computed:
            sums = sums_of(rows[slot][:kv_len])
            for position in range(kv_len - query_len, kv_len):
                column, offset = divmod(position, self._kv.shape[1])
                self._kv[self._pages[slot, column], offset] = (sums[position], version)
        return routes
