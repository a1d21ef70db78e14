"""When a round starts and when a batch is trained, by counts alone."""

from __future__ import annotations

import random

import pytest

from recipes.asynchrony.pacing import Pacing


def test_without_staleness_a_round_starts_when_the_last_is_trained() -> None:
    pacing = Pacing(groups_per_step=8, max_staleness=0)
    assert pacing.starts_round(in_flight=0, ready=0, rounds=0)
    assert not pacing.starts_round(in_flight=8, ready=0, rounds=1)
    assert not pacing.trains(in_flight=1, ready=7, rounds=1)
    assert pacing.trains(in_flight=0, ready=8, rounds=1)


def test_without_staleness_nothing_is_in_flight_when_a_batch_is_trained() -> None:
    """Two groups had no spread: a second round, of which the first two would be enough."""
    pacing = Pacing(groups_per_step=8, max_staleness=0, resamples=3)
    assert pacing.starts_round(in_flight=0, ready=6, rounds=1)
    assert not pacing.trains(in_flight=0, ready=6, rounds=1)
    assert not pacing.trains(in_flight=5, ready=9, rounds=2)
    assert pacing.trains(in_flight=0, ready=13, rounds=2)


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_so_many_batches_are_started_ahead(staleness: int) -> None:
    pacing = Pacing(groups_per_step=8, max_staleness=staleness)
    started = rounds = 0
    while pacing.starts_round(in_flight=started, ready=0, rounds=rounds):
        started, rounds = started + 8, rounds + 1
    assert started == 8 * (1 + staleness)
    assert not pacing.trains(in_flight=started - 7, ready=7, rounds=rounds)
    assert pacing.trains(in_flight=started - 8, ready=8, rounds=rounds)


def test_a_step_without_anything_to_teach_ends() -> None:
    """Every group is dropped: after as many rounds as the algorithm allows the step goes on."""
    pacing = Pacing(groups_per_step=8, max_staleness=2, resamples=3)
    rounds = 0
    while pacing.starts_round(in_flight=0, ready=0, rounds=rounds):
        rounds += 1
        assert not pacing.trains(in_flight=8, ready=0, rounds=rounds)
    assert rounds == 1 + 2 + 3
    assert pacing.trains(in_flight=0, ready=0, rounds=rounds)


@pytest.mark.parametrize("seed", range(20))
def test_in_the_order_they_started_no_group_is_older_than_the_bound(seed: int) -> None:
    """Whatever ends when and whatever is dropped. A run without staleness may have the surplus of
    the step before."""
    rng = random.Random(seed)
    staleness, num = rng.randrange(4), rng.randrange(1, 6)
    pacing = Pacing(groups_per_step=num, max_staleness=staleness, resamples=2)
    started: dict[int, int] = {}
    flying: list[int] = []
    ready: list[int] = []
    for version in range(40):
        rounds = 0
        while True:
            while pacing.starts_round(in_flight=len(flying), ready=len(ready), rounds=rounds):
                fresh = range(len(started), len(started) + num)
                started.update(dict.fromkeys(fresh, version))
                flying, rounds = [*flying, *fresh], rounds + 1
            in_turn = [p for p in ready if p < min(flying, default=10**9)]
            if pacing.trains(in_flight=len(flying), ready=len(in_turn), rounds=rounds):
                break
            flying.remove(landed := rng.choice(flying))
            ready += [landed] if rng.random() < 0.7 else []
        batch = sorted(in_turn)[:num]
        ready = [p for p in ready if p not in batch]
        assert all(version - started[p] <= max(staleness, 1) for p in batch)
