"""A critic on DeepSpeed and FSDP2, on one and two processes, learns what the plain one learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import critic_ranks as ranks
from tests.helpers.rank_processes import run_ranks

pytestmark = pytest.mark.slow
SIZES = (1, 2)
NAMES = ["zero0", "zero1", "zero2", "zero3", "fsdp"]
Ranks = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def plain() -> dict[bool, dict[str, Any]]:
    """By whether the network is the critic's own."""
    return {own: ranks.figures(ranks.plain(), ranks.ALONE, own=own) for own in (False, True)}


@pytest.fixture(scope="module")
def deepspeed(folder: Path) -> Ranks:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    return {size: run_ranks(ranks.deepspeed_ranks, size, folder / f"ds{size}") for size in SIZES}


@pytest.fixture(scope="module")
def fsdp(folder: Path) -> Ranks:
    return {size: run_ranks(ranks.fsdp_ranks, size, folder / f"fsdp{size}") for size in SIZES}


def of(name: str, request: pytest.FixtureRequest) -> Ranks:
    got: Ranks = request.getfixturevalue("fsdp" if name == "fsdp" else "deepspeed")
    return got


def assert_alike(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """The figures of a step."""
    # Another cut into micro-batches shares other prefixes.
    drop = "perf/trainer_computed_tokens"
    assert ours.keys() == theirs.keys()
    ours, theirs = ({k: v for k, v in row.items() if k != drop} for row in (ours, theirs))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=3e-5)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_back_end_learns_what_plain_does(
    name: str, size: int, own: bool, plain: dict[bool, Any], request: pytest.FixtureRequest
) -> None:
    want = plain[own]
    for rank in of(name, request)[size]:
        got = rank[f"{name}-own" if own else name]
        for key in ("values", "logprobs", "head"):
            for ours, theirs in zip(got[key], want[key], strict=True):
                np.testing.assert_allclose(ours, theirs, atol=3e-5, err_msg=key)
        for ours, theirs in zip(got["rows"], want["rows"], strict=True):
            assert_alike(ours, theirs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_reward_model_learns_values_on_every_back_end(
    name: str, size: int, request: pytest.FixtureRequest
) -> None:
    want = ranks.scored(ranks.plain(ranks.reward_model()), ranks.ALONE)
    assert float(np.concatenate(want["before"]).std()) > 0.1
    for rank in of(name, request)[size]:
        got = rank[f"{name}-scored"]
        for key in ("before", "values"):
            for ours, theirs in zip(got[key], want[key], strict=True):
                np.testing.assert_allclose(ours, theirs, atol=3e-5, err_msg=key)
        for ours, theirs in zip(got["rows"], want["rows"], strict=True):
            assert_alike(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_the_head_is_the_same_in_all_processes(name: str, request: pytest.FixtureRequest) -> None:
    first, second = (rank[name]["head"] for rank in of(name, request)[2])
    for ours, theirs in zip(first, second, strict=True):
        assert np.array_equal(ours, theirs) and ours.any()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_close(
    name: str, plain: dict[bool, Any], request: pytest.FixtureRequest
) -> None:
    got = np.concatenate(of(name, request)[2][0][f"{name}-bfloat16"]["values"])
    assert 0 < np.abs(got - np.concatenate(plain[False]["values"])).mean() < 0.05


@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_a_resumed_critic_goes_on_as_if_nothing_had_been(
    name: str, request: pytest.FixtureRequest
) -> None:
    for rank in of(name, request)[2]:
        unbroken, resumed = rank["resumed"]["rows"]
        assert resumed == unbroken
        assert np.array_equal(*rank["resumed"]["values"])
