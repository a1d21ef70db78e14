"""Verifying steps on a GPU: captured or not, overlapped or not, beside rows that draft nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.protocol import Request, RequestOutput
from tests.helpers.drafters import DraftingEngine, random_prompts, texts_of
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.same_outputs import SameOutputs
from tests.helpers.samplers import SAMPLERS
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.gpu

VOCAB, SIZE = 100, 40
DRAFTERS: dict[str, dict[str, Any] | None] = {
    "ngram": None,
    "perfect": {},
    "adversarial": {"shift": 1},
    "mixed": {"mixed": True},
}


class Bed:
    """A tiny model with heads of a width that every back end serves."""

    def __init__(self, folder: Path, arch: str) -> None:
        self.folder = folder
        self.model = write_tiny(folder, arch, head_dim=64, max_position_embeddings=256)

    def plain(self, requests: list[Request], **options: Any) -> dict[str, RequestOutput]:
        with make_replica(self.folder, device="cuda", **options) as replica:
            replica.submit(requests)
            return drain(replica)

    def drafted(
        self,
        requests: list[Request],
        texts: dict[int, list[int]],
        drafter: dict[str, Any] | None,
        **options: Any,
    ) -> dict[str, RequestOutput]:
        with DraftingEngine(self.folder, device="cuda", **options) as engine:
            if drafter is not None:
                engine.draft_texts(texts, **drafter)
            engine.replica.submit(requests)
            return drain(engine.replica)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("tiny"), request.param)


def several() -> list[Request]:
    """Every sampler, of which some draft nothing; prompts of 1 to 60 tokens."""
    prompts = random_prompts(4 * len(SAMPLERS), VOCAB, longest=60)
    return [
        request(
            f"{sampler}-{nth}",
            prompts[4 * at + nth],
            seed=1000 * at + nth,
            stop_ids=sampling.get("stop_token_ids", []),
            **{"max_new_tokens": SIZE, **sampling},
        )
        for at, (sampler, sampling) in enumerate(SAMPLERS.items())
        for nth in range(4)
    ]


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_ids_are_those_of_plain_decoding(bed: Bed, drafter: str, k: int) -> None:
    """Mixed steps too: a pool of slots that is smaller than the batch admits some late."""
    requests = several()
    want = bed.plain(requests)
    texts = texts_of(requests, want)
    got = bed.drafted(requests, texts, DRAFTERS[drafter], k=k, max_running=24)
    SameOutputs(bed.model).same(requests, got, want)
    assert sum(one.spec.drafted for one in got.values() if one.spec is not None) > 0


@pytest.mark.parametrize("drafter", ["ngram", "mixed"])
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in turn"])
def test_graphs_and_overlap_change_no_token(
    bed: Bed, drafter: str, cuda_graphs: bool, overlap: bool
) -> None:
    requests = several()
    want = bed.plain(requests)
    options = {"cuda_graphs": cuda_graphs, "overlap": overlap}
    got = bed.drafted(requests, texts_of(requests, want), DRAFTERS[drafter], **options)
    SameOutputs(bed.model).same(requests, got, want)


def test_a_steady_batch_has_the_same_bits_with_overlap(bed: Bed) -> None:
    requests = equal_rows(6)
    # What steps of as many rows give, so that every draft comes true and all rows end together.
    texts = texts_of(requests, bed.plain(requests, dtype="bfloat16"))
    wrong = bed.drafted(requests, texts, {"shift": 1}, dtype="bfloat16", overlap=False)
    texts = texts_of(requests, wrong)
    outputs = [
        bed.drafted(requests, texts, {}, dtype="bfloat16", overlap=overlap)
        for overlap in (False, True)
    ]
    for rid, first in outputs[0].items():
        assert outputs[1][rid].token_ids.tolist() == first.token_ids.tolist()
        assert outputs[1][rid].logprobs.tobytes() == first.logprobs.tobytes()
        assert first.spec is not None and first.spec.drafted == first.spec.accepted > 0


def equal_rows(count: int, size: int = 41) -> list[Request]:
    rng = np.random.default_rng(7)
    return [
        request(f"e{nth}", rng.integers(3, VOCAB, 30).tolist(), seed=70 + nth, max_new_tokens=size)
        for nth in range(count)
    ]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_virtual_row_has_the_bits_of_a_decoded_one(bed: Bed, k: int) -> None:
    """One row with k drafts is a step of k + 1 rows: what it computes is what a row among as many
    computes, bit for bit in bfloat16."""
    requests = equal_rows(k + 1)
    want = bed.plain(requests, dtype="bfloat16")
    texts = texts_of(requests, want)
    for one in requests:
        # The others end with their prompts, whose step is then the same.
        alone = [each if each is one else ending_at_once(each) for each in requests]
        got = bed.drafted(alone, texts, {}, dtype="bfloat16", k=k)[one.rid]
        expected = want[one.rid]
        assert got.token_ids.tolist() == expected.token_ids.tolist()
        assert got.logprobs.tobytes() == expected.logprobs.tobytes()
        assert got.spec is not None and got.spec.drafted == got.spec.accepted > 0


def ending_at_once(asked: Request) -> Request:
    sampling = msgspec.structs.replace(asked.sampling, max_new_tokens=1)
    return msgspec.structs.replace(asked, sampling=sampling)


def test_a_row_with_top_logprobs_beside_rows_that_draft(bed: Bed) -> None:
    requests = equal_rows(6)
    requests[2] = msgspec.structs.replace(requests[2], top_logprobs=4)
    want = bed.plain(requests)
    got = bed.drafted(requests, texts_of(requests, want), {"mixed": True})
    SameOutputs(bed.model).same(requests, got, want)
    left, right = got["e2"].top, want["e2"].top
    assert left is not None and right is not None
    assert left.ids.tolist() == right.ids.tolist()
    np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-4)
