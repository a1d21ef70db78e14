"""DeepSpeed and FSDP2 on one and two processes learn what the plain trainer learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.trainers.loss_scale import FIRST_POWER
from recipes.trainers.metrics import TokenMetrics, merge
from recipes.trainers.sharded import even_by_length
from recipes.world import World
from tests.helpers import trainer_ranks as ranks
from tests.helpers.rank_processes import run_ranks

pytestmark = pytest.mark.slow
SIZES = (1, 2)

FIRST = 2.0**FIRST_POWER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return ranks.figures(ranks.plain(), World())


@pytest.fixture(scope="module")
def deepspeed(folder: Path) -> dict[int, list[dict[str, Any]]]:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    return {
        2: run_ranks(ranks.deepspeed_ranks, 2, folder / "ds2"),
        1: run_ranks(ranks.deepspeed_alone, 1, folder / "ds1"),
    }


@pytest.fixture(scope="module")
def fsdp(folder: Path) -> dict[int, list[dict[str, Any]]]:
    return {
        2: run_ranks(ranks.fsdp_ranks, 2, folder / "fsdp2"),
        1: run_ranks(ranks.fsdp_alone, 1, folder / "fsdp1"),
    }


def assert_same(got: dict[str, Any], want: dict[str, Any], atol: float = 2e-5) -> None:
    """Logprobs, losses, norms and figures of every step."""
    for key in ("before", "after", "reference"):
        for ours, theirs in zip(got[key], want[key], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=atol)
    assert len(got["rows"]) == len(want["rows"]) == ranks.STEPS
    for ours, theirs in zip(got["rows"], want["rows"], strict=True):
        # Another cut into micro-batches shares other prefixes.
        drop = {"perf/trainer_computed_tokens"}
        assert ours.keys() == theirs.keys()
        ours = {key: value for key, value in ours.items() if key not in drop}
        theirs = {key: value for key, value in theirs.items() if key not in drop}
        assert ours == pytest.approx(theirs, rel=1e-3, abs=atol)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_learns_what_plain_does(
    deepspeed: dict[int, Any], plain: dict[str, Any], size: int, stage: int
) -> None:
    for rank in deepspeed[size]:
        assert_same(rank[f"zero{stage}"], plain)


@pytest.mark.parametrize("size", SIZES)
def test_fsdp_learns_what_plain_does(
    fsdp: dict[int, Any], plain: dict[str, Any], size: int
) -> None:
    for rank in fsdp[size]:
        assert_same(rank["fsdp"], plain)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "fsdp"])
def test_bfloat16_stays_close(
    name: str, plain: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Closer than steps taken without float32 masters would be, which are off by 0.2."""
    ranks = request.getfixturevalue("fsdp" if name == "fsdp" else "deepspeed")[2]
    got = np.concatenate(ranks[0][f"{name}-bfloat16"]["after"])
    assert 0 < np.abs(got - np.concatenate(plain["after"])).mean() < 0.12


HALF_STAGES = ["zero0", "zero2", "zero3"]


@pytest.mark.parametrize("name", [*HALF_STAGES, "fsdp", "plain"])
def test_float16_learns_what_float32_does_and_stays_closer_than_bfloat16(
    name: str, request: pytest.FixtureRequest
) -> None:
    want = ranks.figures(ranks.plain(), World(), ranks.small_loss)
    if name == "plain":
        got = ranks.figures(ranks.plain(torch.float16), World(), ranks.small_loss)
    else:
        fixture = request.getfixturevalue("fsdp" if name == "fsdp" else "deepspeed")
        got = fixture[2][0][f"{name}-float16"]
    difference = np.abs(np.concatenate(got["after"]) - np.concatenate(want["after"]))
    assert 0 < difference.mean() < 0.02
    norms = [[row["grad_norm"] for row in figures["rows"]] for figures in (got, want)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("name", [*HALF_STAGES, "fsdp"])
def test_an_overflow_in_one_process_skips_the_step_in_all(
    name: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue("fsdp" if name == "fsdp" else "deepspeed")[2]
    for rank in found:
        seen = rank[f"{name}-skipped"]
        assert seen["norm"] == 0.0
        assert seen["scales"] == [(FIRST, 0), (FIRST / 2, 1), (FIRST / 2, 1)]
        assert np.array_equal(*seen["logprobs"])
        assert seen["rows"][0] == seen["rows"][1]
        assert seen["rows"][0][0]["grad_norm"] > 0
        assert np.array_equal(*seen["after"])
        assert not np.array_equal(seen["after"][0], seen["logprobs"][0])


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_masters_start_at_the_full_precision_weights(
    deepspeed: dict[int, Any], stage: int
) -> None:
    wanted = dict(ranks.model().named_parameters())
    for rank in deepspeed[2]:
        masters = rank[f"zero{stage}-masters"]
        assert masters.keys() == wanted.keys()
        for name, (master, dtype) in masters.items():
            assert dtype == "torch.bfloat16"
            assert torch.equal(master.view(-1), wanted[name].detach().float().view(-1)), name


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_a_resumed_trainer_goes_on_as_if_nothing_had_been(
    kind: str, request: pytest.FixtureRequest
) -> None:
    for rank in request.getfixturevalue(kind)[2]:
        (unbroken, resumed) = rank["resumed"]["rows"]
        assert resumed == unbroken
        assert np.array_equal(*rank["resumed"]["logprobs"])


def test_fsdp_goes_on_with_another_number_of_processes(fsdp: dict[int, Any]) -> None:
    alone, two = fsdp[1][0]["after two"], fsdp[2][0]["resumed"]["logprobs"][0]
    np.testing.assert_allclose(alone, two, atol=2e-5)


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp"])
def test_a_batch_without_any_advantage_has_no_gradient(
    kind: str, request: pytest.FixtureRequest
) -> None:
    assert [rank["no gradient"] for rank in request.getfixturevalue(kind)[2]] == [False, False]


@pytest.mark.parametrize("kind,name", [("deepspeed", "ds2"), ("fsdp", "fsdp2")])
def test_the_written_model_is_the_trained_one(
    kind: str, name: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    figures = request.getfixturevalue(kind)[2][0]
    after = figures["zero3" if kind == "deepspeed" else "fsdp"]["after"]
    loaded = AutoModelForCausalLM.from_pretrained(folder / name / "model", dtype=torch.float32)
    trainer = ranks.plain()
    trainer.model.load_state_dict(loaded.state_dict())
    for ours, theirs in zip(trainer.logprobs(ranks.batch(0).trajectories), after, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_shares_are_even_in_length_and_cover_everything() -> None:
    assert even_by_length([], 2) == [range(0), range(0)]
    assert even_by_length([5], 2) in ([range(1), range(1, 1)], [range(0), range(1)])
    assert even_by_length([9, 1, 1, 1, 9, 3], 2) == [range(4), range(4, 6)]
    for num in (1, 2, 3, 5):
        shares = even_by_length([3, 1, 4, 1, 5, 9, 2, 6], num)
        assert [index for share in shares for index in share] == list(range(8))


def test_merged_metrics_are_those_of_one_process() -> None:
    whole, halves = TokenMetrics(), [TokenMetrics(), TokenMetrics()]
    trainer = ranks.plain()
    batch = ranks.batch(0)
    trainer.accumulate(batch, ranks.LOSS, whole)
    for half, rows in zip(halves, ([0, 1, 2, 3], [4, 5, 6, 7, 8]), strict=True):
        trainer.accumulate(batch.select(rows), ranks.LOSS, half)
    merged = merge(halves).result()
    drop = "perf/trainer_computed_tokens"
    assert merged.pop(drop) >= whole.computed_tokens
    assert merged == pytest.approx({k: v for k, v in whole.result().items() if k != drop}, rel=1e-4)
