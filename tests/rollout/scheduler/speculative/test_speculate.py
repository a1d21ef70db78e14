"""The controller of drafts on a fake clock: never slower than plain steps, faster where it can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from engine.config import DRAFT_LADDER, MAX_VERIFY_ROWS, SpeculativeConfig
from engine.errors import UnsupportedOption
from rollout.scheduler.speculative.drafts import Controller
from rollout.scheduler.speculative.ladder import row_bucket, rungs
from rollout.scheduler.speculative.speculate import build_controller
from rollout.scheduler.speculative.verify_cost import CPU_COSTS, GPU_COSTS
from tests.helpers.draft_world import (
    Cost,
    World,
    by_row,
    fixed_seconds,
    flat_to_240,
    verify_half_more,
)

WORLDS: list[tuple[Cost, str, str]] = [
    (flat_to_240, "cuda", "time"),
    (verify_half_more, "cuda", "time"),
    (by_row, "cpu", "time"),
    (flat_to_240, "cuda", "counts"),
    (by_row, "cpu", "counts"),
]
"""True costs, the device that the controller is told, and how it judges; one that judges by counts
can only be right where its model is."""
MOST_LOST = 0.99
TOKENS = 2000


def adaptive(world: World, *, device: str, pace: str = "time", draft_tokens: int = 7) -> Controller:
    config = SpeculativeConfig(method="auto", draft_tokens=draft_tokens, pace=pace)
    return build_controller(config, device=device, clock=world.clock)


def best_seconds(cost: Cost, num_rows: int, rate: float, tokens: int) -> float:
    """Seconds with the fixed number of drafts that is best."""
    lengths = (0, *rungs(num_rows, 7))
    return min(fixed_seconds(cost, num_rows, k, rate, tokens) for k in lengths)


def compare(world: World, device: str, pace: str, num_rows: int) -> None:
    """`TOKENS` tokens in a world are not slower than plain ones, and near the best there is, unless
    that is what the controller would not try: verify steps of many rows that cost no more than
    those of few, which a GPU has not."""
    seconds = world.run(adaptive(world, device=device, pace=pace), num_rows, TOKENS)
    plain = TOKENS * world.cost(num_rows, 0)
    best = best_seconds(world.cost, num_rows, world.rate, TOKENS)
    assert plain / seconds >= MOST_LOST, f"{num_rows} rows: {plain / seconds:.3f} of plain"
    if plain / best > 1.2 and (num_rows <= 64 or world.cost is not verify_half_more):
        assert best / seconds >= 0.9, f"{num_rows} rows: {best / seconds:.3f} of the best"


@pytest.mark.parametrize("cost, device, pace", WORLDS)
@pytest.mark.parametrize("num_rows", [1, 16, 256])
def test_a_step_that_always_costs_the_same(
    cost: Cost, device: str, pace: str, num_rows: int
) -> None:
    for rate in (0.0, 0.5):
        compare(World(cost, rate, seed=num_rows), device, pace, num_rows)


@pytest.mark.long
@pytest.mark.parametrize("cost, device, pace", WORLDS)
@pytest.mark.parametrize("num_rows", [1, 2, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("overlap", [False, True])
def test_all_numbers_of_rows(
    cost: Cost, device: str, pace: str, num_rows: int, overlap: bool
) -> None:
    for rate in (0.0, 0.2, 0.5, 0.8):
        for seed in range(2):
            world = World(cost, rate, overlap=overlap, seed=seed)
            compare(world, device, pace, num_rows)


@pytest.mark.slow
@pytest.mark.parametrize("cost, device, pace", WORLDS)
@pytest.mark.parametrize("rates", [(0.0, 0.8), (0.8, 0.0), (0.5, 0.0, 0.5, 0.0)])
@pytest.mark.parametrize("num_rows", [1, 16])
def test_acceptance_that_changes(
    cost: Cost, device: str, pace: str, rates: Sequence[float], num_rows: int
) -> None:
    world = World(cost, rates[0], overlap=True)
    controller = adaptive(world, device=device, pace=pace)
    seconds = 0.0
    for rate in rates:
        world.rate = rate
        last = world.run(controller, num_rows, TOKENS)
        seconds += last
    plain = TOKENS * cost(num_rows, 0)
    assert len(rates) * plain / seconds >= MOST_LOST
    # What was gained before does not hide what is lost now, but for the reaction to it.
    assert plain / last >= 0.98
    if rates[-1] and plain / best_seconds(cost, num_rows, rates[-1], TOKENS) > 2:
        assert plain / last > 1.3, "drafts that pay were not found"


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 16, 64, 128])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5])
def test_costs_that_change(num_rows: int, rate: float) -> None:
    def doubled(num_rows: int, k: int) -> float:
        return 2 * flat_to_240(num_rows, k)

    def costly_drafts(num_rows: int, k: int) -> float:
        return 0.005 * (3 if k else 1)

    for later in (verify_half_more, doubled, costly_drafts):
        world = World(flat_to_240, rate, overlap=True)
        controller = adaptive(world, device="cuda")
        first = world.run(controller, num_rows, TOKENS)
        world.cost = later
        second = world.run(controller, num_rows, TOKENS)
        plain = TOKENS * (flat_to_240(num_rows, 0) + later(num_rows, 0))
        assert plain / (first + second) >= MOST_LOST
        # Until half of the times that are remembered are new ones.
        assert TOKENS * later(num_rows, 0) / second >= 0.96
        best = best_seconds(later, num_rows, rate, TOKENS)
        if TOKENS * later(num_rows, 0) / best > 1.2:
            assert best / second >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("cost, device, pace", WORLDS)
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8])
def test_rows_that_end_one_after_another(cost: Cost, device: str, pace: str, rate: float) -> None:
    world = World(cost, rate, overlap=True)
    controller = adaptive(world, device=device, pace=pace)
    seconds = plain = best = 0.0
    for num_rows in (256, 200, 150, 120, 100, 80, 60, 50, 40, 30, 20, 15, 10, 7, 5, 4, 3, 2, 1):
        seconds += world.run(controller, num_rows, 200)
        plain += 200 * cost(num_rows, 0)
        best += best_seconds(cost, num_rows, rate, 200)
    assert plain / seconds >= MOST_LOST
    if plain / best > 1.2 and (num_rows <= 64 or world.cost is not verify_half_more):
        assert best / seconds >= 0.88


def test_drafts_that_are_seldom_found_do_not_cost_more() -> None:
    world = World(verify_half_more, 0.9, found=0.05)
    seconds = world.run(adaptive(world, device="cuda"), 32, TOKENS)
    assert TOKENS * verify_half_more(32, 0) / seconds >= MOST_LOST


def test_counts_alone_decide_where_they_are_to() -> None:
    """What steps take is of no matter, and no clock is read."""

    def forbidden() -> float:
        raise AssertionError("the clock was read")

    config = SpeculativeConfig(method="auto", draft_tokens=7, pace="counts")
    chosen = []
    for speed in (1.0, 30.0):
        world = World(lambda rows, k, speed=speed: speed * by_row(rows, k), 0.6, seed=3)
        world.run(build_controller(config, device="cuda", clock=forbidden), 8, 300)
        chosen.append(world.chosen)
    assert any(chosen[0])
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("method", ["auto", "ngram", "off"])
@pytest.mark.parametrize("draft_tokens", [1, 2, 3, 5, 7])
def test_a_choice_fits(method: str, draft_tokens: int) -> None:
    world = World(flat_to_240, 0.9)
    config = SpeculativeConfig(method=method, draft_tokens=draft_tokens)
    controller = build_controller(config, device="cuda", clock=world.clock)
    for num_rows in (1, 64, 65, 128, 129, 256, 257, 600):
        world.chosen.clear()
        world.run(controller, num_rows, 60)
        for k in world.chosen:
            built_for = min(rung for rung in (0, *DRAFT_LADDER) if rung >= k)
            assert k <= draft_tokens
            assert k == 0 or num_rows * (built_for + 1) <= MAX_VERIFY_ROWS
        if method == "ngram":
            whole = min(rung for rung in DRAFT_LADDER if rung >= draft_tokens)
            fits = num_rows * (whole + 1) <= MAX_VERIFY_ROWS
            most = draft_tokens if fits else max(rungs(num_rows, draft_tokens), default=0)
            assert set(world.chosen) == {most}
        if method == "off":
            assert set(world.chosen) == {0}


def test_a_drafter_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedOption, match="'eagle3'") as error:
        build_controller(SpeculativeConfig(method="eagle3"), device="cuda")
    assert error.value.field == "speculative"


def test_rows_fall_into_buckets_that_hold_them() -> None:
    buckets = [row_bucket(rows) for rows in range(1, 1300)]
    assert all(bucket >= rows for rows, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets)


def test_steps_that_fail_are_forgotten() -> None:
    """Steps that were planned and have no result, one with a prompt, rows that had all ended."""
    world = World(flat_to_240, 0.5)
    controller = adaptive(world, device="cuda")
    controller.planned(0, 4, 0)
    controller.planned(1, 4, 3)
    controller.planned(7, 4, 3)
    controller.observe(6, np.ones(2, np.int32))
    controller.observe(7, np.zeros(4, np.int32))
    assert controller.choose(4) == 0


def test_a_model_is_straight_between_what_was_measured() -> None:
    assert [GPU_COSTS.step(rows, 0) for rows in (1, 60, 240, 480, 960)] == [1, 1, 1, 2, 4]
    assert GPU_COSTS.step(64, 7) == pytest.approx(512 / 240)
    assert CPU_COSTS.step(1, 0) == 1 and CPU_COSTS.step(1, 1) == CPU_COSTS.step(2, 0) == 1.03
    assert CPU_COSTS.step(3, 0) == pytest.approx((1.03 + 1.74) / 2)
    assert CPU_COSTS.step(16, 3) == 4.74
    assert CPU_COSTS.step(96, 0) == pytest.approx(4.74 + 1.55)


class Capped:
    """A controller whose choices are cut to `most` drafts, as those of requests that allow no more
    are."""

    def __init__(self, controller: Controller, most: int) -> None:
        self._controller, self._most = controller, most
        self.planned, self.observe = controller.planned, controller.observe

    def choose(self, num_rows: int) -> int:
        return min(self._controller.choose(num_rows), self._most)


@pytest.mark.parametrize("most", [0, 1, 2])
def test_requests_that_allow_fewer_drafts(most: int) -> None:
    """What is asked for and never planned is not waited for."""
    for rate in (0.0, 0.5):
        world = World(verify_half_more, rate, overlap=True)
        seconds = world.run(Capped(adaptive(world, device="cuda"), most), 8, TOKENS)
        assert TOKENS * verify_half_more(8, 0) / seconds >= MOST_LOST


class Captures:
    """Costs, the first step of each kind taking a hundred times as long."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, num_rows: int, k: int) -> float:
        kind = (row_bucket(num_rows), k)
        first = kind not in self._seen
        self._seen.add(kind)
        return self._cost(num_rows, k) * (100 if first else 1)


@pytest.mark.parametrize("overlap", [False, True])
def test_capturing_a_graph_is_not_taken_for_the_cost_of_a_step(overlap: bool) -> None:
    world = World(Captures(flat_to_240), 0.6, noise=0.0, overlap=overlap)
    controller = adaptive(world, device="cuda", draft_tokens=3)
    world.run(controller, 4, 300)
    assert world.chosen[-20:] == [3] * 20
