"""The simulator of a fleet, on constants of the test's own: what holds without a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.router.choice.ask import Policy
from rollout.router.choice.cache_aware import CacheAware
from rollout.router.choice.plain_policies import LeastLoad, RoundRobin

ROOT = Path(__file__).resolve().parents[2]
POLICIES: dict[str, Callable[[Any], Policy]] = {
    "cache_aware": lambda clock: CacheAware(seed=0, clock=clock),
    "least_load": lambda _: LeastLoad(),
    "round_robin": lambda _: RoundRobin(),
}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def costs(**changes: Any) -> Any:
    from fleet_sim_replica import Costs

    given = {"step_s": 0.01, "row_s": 0.0005, "kv_s": 1e-7, "prefill_s": 2e-5, "reply_s": 0.0}
    return Costs(**(given | changes))


def job(number: int, **changes: Any) -> Any:
    from fleet_sim_replica import Job

    given: dict[str, Any] = {"num_out": 10, "prompt_tokens": 100, "arrives": 0.0}
    given |= {"prompt": b"%d" % number * 100, "prefixes": ((number, 100),)}
    return Job(number=number, **(given | changes))


def simulated(
    jobs: Iterator[Any], replicas: int, policy: str = "cache_aware", **options: Any
) -> Any:
    from fleet_sim_fleet import Fleet

    given = options.pop("costs", None) or costs()
    return Fleet(given, replicas, POLICIES[policy], **options).run(jobs)


def of_load(policy: str, replicas: int, *, events: Any = None, **load: Any) -> Any:
    from fleet_sim_load import Load, Requests

    given = load.pop("costs", None)
    requests = Requests(Load(**load))
    return simulated(
        iter(requests), replicas, policy, events=events, after=requests.after, costs=given
    )


def test_one_request_takes_its_steps_and_its_prompt() -> None:
    given = costs(kv_s=1e-5, reply_s=0.5)
    (latency,) = simulated(iter([job(1)]), 1, costs=given).latencies_s
    # Ten steps of one row, over a cache that grows from 100 tokens by one a step.
    steps = 10 * (0.01 + 0.0005 + 1e-5 * 100) + 1e-5 * 10 * 10 / 2
    assert latency == pytest.approx(steps + 100 * 2e-5 + 0.5)


def test_rows_share_their_steps() -> None:
    given = costs(kv_s=0.0, prefill_s=0.0)
    result = simulated((job(number) for number in range(1, 9)), 1, costs=given)
    # The first is alone until the others come, at once; they join at the end of a step.
    assert max(result.latencies_s) == pytest.approx(10.5 * (0.01 + 8 * 0.0005), rel=0.06)
    apart = simulated((job(number) for number in range(1, 9)), 8, "round_robin", costs=given)
    assert max(apart.latencies_s) == pytest.approx(10 * (0.01 + 0.0005))


def test_a_prompt_that_is_cached_is_not_computed_again() -> None:
    given = costs(prefill_s=0.01)
    again = [job(n, prefixes=((0, 80), (n, 100)), arrives=10.0 * n) for n in (1, 2)]
    first, second = simulated(iter(again), 1, costs=given).latencies_s
    assert first - second == pytest.approx(80 * 0.01)


def test_a_cache_that_is_full_retracts_and_loses_nothing() -> None:
    given = costs(kv_tokens=450)
    jobs = (job(number, num_out=200, prompt=b"x") for number in range(1, 5))
    result = simulated(jobs, 1, costs=given)
    assert result.retracted > 0
    assert result.ends == dict.fromkeys(range(1, 5), 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_exactly_once_whatever_happens(policy: str) -> None:
    from fleet_sim_fleet import Events

    events = Events(
        commits=(5.0, 11.0),
        commit_s=0.3,
        deaths=((3.0, 0), (3.1, 1), (3.2, 2), (3.3, 3), (9.0, 2)),
        down_s=2.0,
    )
    load = {"count": 600, "rate": 40.0, "out_tokens": 40, "turns": 3, "samples": 4}
    given = costs(kv_tokens=9_000)
    result = of_load(policy, 4, events=events, costs=given, **load)
    assert len(result.ends) == 600
    assert set(result.ends.values()) == {1}
    assert result.moved > 0
    assert result.tokens > 600
    assert min(result.latencies_s) > 0


def test_a_seed_says_everything() -> None:
    load = {"count": 300, "rate": 30.0, "out_tokens": 30, "turns": 2}
    first, again = (of_load("cache_aware", 20, **load).figures() for _ in range(2))
    assert first == again
    assert of_load("cache_aware", 20, seed=1, **load).figures() != first


def test_what_is_cached_is_found_by_the_policy_that_looks_for_it() -> None:
    load = {"count": 400, "rate": 20.0, "out_tokens": 20, "turns": 8, "prompt_tokens": 800}
    load |= {"systems": 8, "system_tokens": 64}
    shares = {
        name: of_load(name, 8, costs=costs(kv_tokens=60_000), **load).figures()["hit_share"]
        for name in POLICIES
    }
    assert shares["cache_aware"] > 1.5 * shares["round_robin"]
    # Other weights leave nothing of it.
    from fleet_sim_fleet import Events

    often = Events(commits=tuple(float(second) for second in range(1, 60)))
    emptied = of_load("cache_aware", 8, events=often, costs=costs(kv_tokens=60_000), **load)
    assert emptied.figures()["hit_share"] < 0.7 * shares["cache_aware"]
