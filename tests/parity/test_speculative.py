"""Drafts change what a step costs and nothing else: the ids of plain decoding in float32 for every
sampler, drafter and number of drafts. A first difference is excused where rounding may decide the
draw (`near_edges`), and counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.protocol import Request, RequestOutput
from tests.helpers.drafters import DraftingEngine, random_prompts, texts_of
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.same_outputs import SameOutputs
from tests.helpers.samplers import SAMPLERS
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.slow

VOCAB, SIZE = 100, 24
PLAIN_SAMPLERS = ("greedy", "plain", "top_p", "top_k", "min_p")
DRAFTERS: dict[str, dict[str, Any] | None] = {
    "ngram": None,
    "perfect": {},
    "adversarial": {"shift": 1},
    "mixed": {"mixed": True},
}


class Bed:
    """A tiny model and what plain decoding gives of it."""

    def __init__(self, folder: Path, arch: str = "llama") -> None:
        self.folder = folder
        self.model = write_tiny(folder, arch)
        self._plain: dict[tuple[str, int], dict[str, RequestOutput]] = {}

    def requests(self, sampler: str, count: int) -> list[Request]:
        sampling = {"max_new_tokens": SIZE, **SAMPLERS[sampler]}
        prompts = random_prompts(count, VOCAB, longest=40)
        return [
            request(f"{sampler}-{nth}", prompt, seed=1000 + nth, **sampling)
            for nth, prompt in enumerate(prompts)
        ]

    def plain(self, sampler: str, count: int) -> dict[str, RequestOutput]:
        key = sampler, count
        if key not in self._plain:
            with make_replica(self.folder) as replica:
                replica.submit(self.requests(sampler, count))
                self._plain[key] = drain(replica)
        return self._plain[key]

    def drafted(
        self, engine: DraftingEngine, sampler: str, count: int, drafter: str
    ) -> dict[str, RequestOutput]:
        """The same by an engine that drafts."""
        requests, options = self.requests(sampler, count), DRAFTERS[drafter]
        if options is not None:
            engine.draft_texts(texts_of(requests, self.plain(sampler, count)), **options)
        engine.replica.submit(requests)
        return drain(engine.replica)


@pytest.fixture(scope="module")
def bed(tmp_path_factory) -> Bed:
    return Bed(tmp_path_factory.mktemp("tiny"))


def check_matrix(
    bed: Bed, drafter: str, k: int, samplers: Sequence[str], count: int
) -> SameOutputs:
    checks = SameOutputs(bed.model)
    drafted = accepted = 0
    with DraftingEngine(bed.folder, k=k) as engine:
        for sampler in samplers:
            got = bed.drafted(engine, sampler, count, drafter)
            checks.same(bed.requests(sampler, count), got, bed.plain(sampler, count))
            specs = [output.spec for output in got.values() if output.spec is not None]
            drafted += sum(spec.drafted for spec in specs)
            accepted += sum(spec.accepted for spec in specs)
    assert drafted > 0
    if drafter == "adversarial":
        assert accepted == 0
    elif drafter == "perfect" and not checks.num_excused:
        assert accepted == drafted
    elif drafter == "mixed":
        assert 0 < accepted < drafted
    return checks


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_ids_are_those_of_plain_decoding(bed: Bed, drafter: str, k: int) -> None:
    samplers = PLAIN_SAMPLERS if k == 3 else ("greedy", "plain")
    check_matrix(bed, drafter, k, samplers, 24)


@pytest.mark.long
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_three_hundred_prompts(bed: Bed, drafter: str, k: int) -> None:
    checks = check_matrix(bed, drafter, k, PLAIN_SAMPLERS, 300)
    assert checks.num_tokens > 30_000


@pytest.mark.long
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma3", "smollm3", "olmo2"])
@pytest.mark.parametrize("drafter", ["mixed", "perfect"])
def test_other_architectures(tmp_path: Path, arch: str, drafter: str) -> None:
    check_matrix(Bed(tmp_path, arch), drafter, 3, PLAIN_SAMPLERS, 24)


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - set(PLAIN_SAMPLERS)))
def test_samplers_that_may_draft_nothing(bed: Bed, sampler: str) -> None:
    """Penalties, bias and bans run beside rows that draft."""
    both = [*bed.requests(sampler, 6), *bed.requests("plain", 6)]
    seeds = [one.seed for one in bed.requests("plain", 6)]
    want = bed.plain(sampler, 6) | bed.plain("plain", 6)
    texts = texts_of(bed.requests("plain", 6), bed.plain("plain", 6))
    assert set(texts) == set(seeds)
    with DraftingEngine(bed.folder) as engine:
        engine.draft_texts(texts, mixed=True)
        engine.replica.submit(both)
        got = drain(engine.replica)
    SameOutputs(bed.model).same(both, got, want)
