"""Rows whose mask restricts what may be drawn: only that is, and every number stays that of the
law without a mask."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch

from engine.batch import RequestTable
from engine.protocol import NewRow, RowSampling, StepMasks
from engine.sampling import Drawn, Sampler
from kernels.sampling.filters import keep_mask
from kernels.sampling.masks import banned_tokens
from kernels.sampling.philox import philox_uniform
from rollout.masks.base import bits_of
from tests.helpers.samplers import SAMPLERS
from tests.helpers.sent_masks import one_a_row

VOCAB = 101


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test draws as on a CPU, and as on a GPU by the reference kernels."""
    if request.param == "gpu":
        monkeypatch.setattr(Sampler, "_draw_on_cpu", Sampler._draw_on_gpu)
    return str(request.param)


NEUTRAL = {
    "temperature": 1.0,
    "top_k": -1,
    "top_p": 1.0,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "seed": 1,
    "min_new_tokens": 0,
    "banned_ids": [],
    "top_logprobs": 0,
}


class Batch:
    """The two vectors of a `StepBatch` that a draw reads."""

    def __init__(self, slots: list[int], lengths: list[int]) -> None:
        self.slots_S = torch.tensor(slots)
        self.kv_lens_S = torch.tensor(lengths)


def sampling_of(**fields: object) -> RowSampling:
    stops = fields.pop("stop_token_ids", [])
    banned = stops if fields.get("min_new_tokens") else []
    return RowSampling(**{**NEUTRAL, "banned_ids": banned, **fields})


class Rows:
    """Rows in slots 0, 1, ... that know three tokens."""

    def __init__(self, *sampling: RowSampling) -> None:
        cpu = torch.device("cpu")
        self.size = len(sampling)
        self.sampler = Sampler(num_slots=self.size, device=cpu, backend="torch")
        self.table = RequestTable(num_slots=self.size, context_length=16, page_size=4, device=cpu)
        known = np.array([1, 2, 3], np.int32)
        rows = [
            NewRow(slot=slot, token_ids=known, prompt_len=3, sampling=own)
            for slot, own in enumerate(sampling)
        ]
        self.table.enter(rows)
        self.sampler.enter(rows)

    def draw(self, logits_SV: torch.Tensor, masks: StepMasks | None = None) -> Drawn:
        slots = list(range(self.size))
        batch = Batch(slots, [3] * self.size)
        own = None if masks is None else self.sampler.masks.enter(masks)
        return self.sampler.draw(logits_SV.clone(), batch, np.array(slots), self.table, own)


def masks_of(allowed: dict[int, list[int]], vocab: int = VOCAB) -> StepMasks:
    bits = [bits_of(ids, vocab) for ids in allowed.values()]
    return one_a_row(0, list(allowed), bits)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 77, 300])
def test_bits_come_back_as_the_tokens_they_are_of(vocab: int) -> None:
    generator = np.random.default_rng(vocab)
    for _ in range(20):
        ids = np.flatnonzero(generator.random(vocab) < 0.3)
        bits = bits_of(ids, vocab)
        assert bits.dtype == np.uint32 and len(bits) == math.ceil(vocab / 32)
        packed = torch.from_numpy(bits.view(np.int32)[None])
        banned = banned_tokens(packed, vocab)
        assert banned.shape == (1, vocab)
        assert (~banned[0]).nonzero().flatten().tolist() == ids.tolist()


def restricted(logits_V: torch.Tensor, sampling: RowSampling, allowed: list[int]) -> int:
    """What a masked row draws, in double precision: by a loop over the allowed tokens."""
    law = torch.full_like(logits_V, float("-inf"))
    law[allowed] = logits_V[allowed]
    if sampling.temperature < 1e-6:
        return int(law.argmax())
    scaled = law / np.float32(sampling.temperature)
    kept = keep_mask(
        scaled[None],
        torch.tensor([sampling.top_k]),
        torch.tensor([sampling.top_p], dtype=torch.float64),
        torch.tensor([sampling.min_p]),
    )[0]
    weights = (scaled.double() - scaled.max()).exp() * kept
    target = float(philox_uniform(torch.tensor([sampling.seed]), torch.tensor([3]))) * weights.sum()
    total = 0.0
    for token in sorted(allowed):
        total += float(weights[token])
        if weights[token] > 0 and total > target:
            return token
    raise AssertionError("the weights end below the target")


@pytest.mark.parametrize("name", ["greedy", "plain", "cold", "top_k", "top_p", "min_p", "filters"])
def test_a_masked_row_draws_what_the_restricted_law_gives(name: str, way: str) -> None:
    generator = torch.Generator().manual_seed(3)
    random = np.random.default_rng(5)
    for seed in range(150 if way == "cpu" else 50):
        sampling = sampling_of(**{**SAMPLERS[name], "seed": seed})
        logits = 3 * torch.randn(1, VOCAB, generator=generator)
        allowed = sorted(random.choice(VOCAB, size=random.integers(1, VOCAB), replace=False))
        rows = Rows(sampling)
        drawn = rows.draw(logits, masks_of({0: allowed}))
        assert int(drawn.token_S[0]) == restricted(logits[0], sampling, allowed)
        scale = 1.0 if sampling.temperature < 1e-6 else sampling.temperature
        law = (logits[0].double() / scale).log_softmax(-1)
        assert float(drawn.logprob_S[0]) == pytest.approx(float(law[drawn.token_S[0]]), abs=1e-5)


def test_over_many_seeds_the_draws_follow_the_restricted_law() -> None:
    logits = torch.linspace(-1, 2, VOCAB)[None]
    allowed = [3, 20, 41, 60, 100]
    law = logits[0, allowed].double().softmax(-1).numpy()
    size = 3000
    rows = Rows(*(sampling_of(seed=seed) for seed in range(size)))
    masks = masks_of(dict.fromkeys(range(size), allowed))
    drawn = rows.draw(logits.expand(size, VOCAB), masks).token_S.tolist()
    counts = [drawn.count(token) for token in allowed]
    assert sum(counts) == size
    expected = size * law
    statistic = float(((np.array(counts) - expected) ** 2 / expected).sum())
    # The 0.9999 quantile of chi-square with four degrees of freedom.
    assert statistic < 23.5


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_beside_a_masked_one_and_its_own_numbers_are_as_without(name: str) -> None:
    sampling = [
        sampling_of(**{**SAMPLERS[name], "seed": seed, "entropy": True, "top_logprobs": 3})
        for seed in range(4)
    ]
    logits = 2 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(9))
    plain = Rows(*sampling).draw(logits)
    # One of them allows what it draws anyway, and so draws that.
    own = int(plain.token_S[2])
    masked = Rows(*sampling).draw(logits, masks_of({0: [4, 5, 6], 2: [own]}))
    others = [1, 3]
    assert torch.equal(masked.token_S[others], plain.token_S[others])
    assert torch.equal(masked.logprob_S[others], plain.logprob_S[others])
    assert torch.equal(masked.entropy_S, plain.entropy_S)
    assert torch.equal(masked.top.ids, plain.top.ids)
    assert torch.equal(masked.top.logprobs, plain.top.logprobs)
    assert int(masked.token_S[0]) in (4, 5, 6)
    assert int(masked.token_S[2]) == own
    assert float(masked.logprob_S[2]) == pytest.approx(float(plain.logprob_S[2]), abs=1e-5)


@pytest.mark.parametrize("low", [-200.0, -1e9, -3e38, float("-inf")])
@pytest.mark.parametrize("name", ["greedy", "plain", "cold", "top_k", "top_p", "min_p", "filters"])
def test_what_is_allowed_comes_however_unlikely_it_is(low: float, name: str) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 8]] = low
    logits[0, 8] *= 0.5
    for seed in range(20):
        sampling = sampling_of(**{**SAMPLERS[name], "seed": seed})
        drawn = Rows(sampling).draw(logits, masks_of({0: [7, 8]}))
        assert int(drawn.token_S[0]) in (7, 8)
        assert math.isfinite(float(drawn.logprob_S[0]))
        assert float(drawn.logprob_S[0]) < -70


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_masked_row_that_is_not_finite_is_still_told_apart(wrong: float) -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[0, 40] = wrong
    drawn = Rows(sampling_of(), sampling_of()).draw(logits, masks_of({0: [1, 2], 1: [1, 2]}))
    assert not math.isfinite(float(drawn.logprob_S[0]))
    assert 0 <= int(drawn.token_S[0]) < VOCAB
    assert math.isfinite(float(drawn.logprob_S[1]))


def test_penalties_and_bias_come_before_the_mask() -> None:
    sampling = sampling_of(temperature=0.0, logit_bias={5: 2.0, 6: 50.0})
    drawn = Rows(sampling).draw(torch.zeros(1, VOCAB), masks_of({0: [4, 5]}))
    assert int(drawn.token_S[0]) == 5
    biased = torch.zeros(VOCAB)
    biased[5], biased[6] = 2.0, 50.0
    assert float(drawn.logprob_S[0]) == pytest.approx(float(biased.log_softmax(-1)[5]), abs=1e-5)


def test_bits_beyond_the_vocabulary_are_not_looked_at() -> None:
    masks = masks_of({0: [9]})
    every = msgspec.structs.replace(masks, bits=masks.bits | ~bits_of(range(VOCAB), VOCAB))
    drawn = Rows(sampling_of()).draw(torch.zeros(1, VOCAB), every)
    assert int(drawn.token_S[0]) == 9


def test_rows_of_every_way_to_draw_stand_side_by_side() -> None:
    """Free, masked, masked with a filter, masked where all that is allowed is nearly impossible,
    and broken: each has what it has alone."""
    logits_SV = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(2))
    logits_SV[3, 90] = -300.0
    logits_SV[5, 1] = float("nan")
    sampling = [
        sampling_of(seed=row, entropy=True, **({"top_k": 3} if row in (2, 4) else {}))
        for row in range(6)
    ]
    allowed = {1: [4, 5, 6], 2: [1, 8, 70, 71, 72], 3: [90], 5: [1, 2]}
    drawn = Rows(*sampling).draw(logits_SV, masks_of(allowed))
    for row in range(6):
        mask = masks_of({0: allowed[row]}) if row in allowed else None
        alone = Rows(sampling[row]).draw(logits_SV[row : row + 1], mask)
        assert int(alone.token_S) == int(drawn.token_S[row])
        torch.testing.assert_close(alone.logprob_S[0], drawn.logprob_S[row], equal_nan=True)
        torch.testing.assert_close(alone.entropy_S[0], drawn.entropy_S[row], equal_nan=True)
        if row in allowed and row != 5:
            assert int(drawn.token_S[row]) in allowed[row]
    assert int(drawn.token_S[3]) == 90 and float(drawn.logprob_S[3]) < -250
    assert not bool(drawn.logprob_S[5].isfinite())
