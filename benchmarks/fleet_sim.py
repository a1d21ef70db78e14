"""A fleet in virtual time, under the router's own policies: which one, and with which numbers.

    python benchmarks/fleet_sim.py --check-only
    python benchmarks/fleet_sim.py --json benchmarks/results/fleet-sim-epyc.json
    python benchmarks/fleet_sim.py --engine model --check-only

check: two real replicas behind the real router get the same requests as the simulator, at 50%,
    70% and 85% of what they can do. `--engine stepping`: servers whose engine
    sleeps for what a step costs; `model`: SmolLM2 on this processor, which has to be idle. Makespan
    and mean latency have to agree within 10%; if they do not, the script ends with `NotLikeReal`,
    and chooses nothing.
fleets: with the costs of a step that were measured on an H100
    (`results/gpu-rollout-1.5b-h100.json`), policies, whether groups stay whole, and how many
    replicas are drawn, from 10 replicas to 10,000.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import checkout
import fleet_sim_real as real
import tyro
from fleet_sim_costs import measured
from fleet_sim_fleet import Events, Fleet
from fleet_sim_load import Load, Requests
from fleet_sim_replica import Costs
from machine import processor

from rollout.router.choice.ask import Policy
from rollout.router.choice.cache_aware import CacheAware
from rollout.router.choice.plain_policies import LeastLoad, RoundRobin

WITHIN = 0.10
SHARES = (0.5, 0.7, 0.85)
"""Of what two replicas can do."""
Make = Callable[[Callable[[], float]], Policy]


class NotLikeReal(Exception):
    """The simulator says something else than real replicas: it may choose nothing."""


@dataclass(frozen=True)
class Options:
    """What to do."""

    engine: real.Engine = "stepping"
    """What the real replicas run."""
    check_only: bool = False
    """End after the check."""
    requests: int = 160
    """Of each load of the check."""
    million: int = 1_000_000
    """Requests of the largest fleet."""
    json: Path | None = None
    """Write what was found to this file."""


def cache_aware(clock: Callable[[], float], **options: Any) -> Policy:
    """The router's default, by the clock of a simulation."""
    return CacheAware(seed=0, clock=clock, **options)


POLICIES: dict[str, Make] = {
    "cache_aware": cache_aware,
    "least_load": lambda _: LeastLoad(),
    "round_robin": lambda _: RoundRobin(),
}


def simulate(
    costs: Costs, replicas: int, policy: Make, load: Load, events: Events | None = None
) -> dict[str, Any]:
    """Figures of one run."""
    requests = Requests(load)
    start = time.perf_counter()
    fleet = Fleet(costs, replicas, policy, events=events, after=requests.after)
    found = fleet.run(iter(requests))
    assert set(found.ends.values()) == {1}, "a request ends once"
    return found.figures() | {"replicas": replicas, "took_s": time.perf_counter() - start}


def capacity(costs: Costs, replicas: int, load: Load) -> float:
    """Requests a second of a fleet that always has some waiting."""
    at_once = replace(load, rate=1e9, turns=1, count=min(load.count, 400 * replicas))
    found = simulate(costs, replicas, POLICIES["least_load"], at_once)
    return float(found["requests"] / found["makespan_s"])


def check(options: Options) -> dict[str, Any]:
    """Figures of both sides. Raises NotLikeReal."""
    found: dict[str, Any] = {"engine": options.engine, "machine": processor(), "loads": []}
    with real.replicas(options.engine, "cache_aware") as fleet:
        # Before, between and after the loads: what else the machine does weighs on all alike.
        batches = real.batches(fleet.replicas[0], 0)
        load = Load(
            count=options.requests, rate=1.0, out_tokens=40, prompt_tokens=192, system_tokens=64
        )
        most = capacity(real.fit(batches), 2, load)
        loads = [replace(load, rate=share * most, seed=n) for n, share in enumerate(SHARES)]
        sides = []
        for turn, paced in enumerate(loads, 1):
            sides.append(real.load(fleet.router, list(Requests(paced))))
            batches += real.batches(fleet.replicas[turn % 2], turn)
    costs = real.fit(batches)
    found |= {"costs": asdict(costs), "capacity_per_s": most}
    for share, paced, side in zip(SHARES, loads, sides, strict=True):
        told = simulate(costs, 2, POLICIES["cache_aware"], paced)
        off = {name: told[name] / side[name] - 1 for name in ("makespan_s", "mean_s")}
        found["loads"].append({"share": share, "real": side, "simulated": told, "off": off})
        print(share, json.dumps(found["loads"][-1]), flush=True)
    print(json.dumps(found["costs"]), flush=True)
    worst = max(abs(value) for one in found["loads"] for value in one["off"].values())
    found["worst"] = worst
    if worst > WITHIN:
        raise NotLikeReal(
            f"makespan or mean latency is {worst:.0%} off, more than {WITHIN:.0%}, on "
            f"{processor()}; is the machine idle? Nothing is chosen"
        )
    return found


def fleets(options: Options) -> list[dict[str, Any]]:
    """Policies and their numbers over fleets of several sizes."""
    costs = measured()
    talks = Load(
        count=20_000, rate=1.0, systems=64, prompt_tokens=512, out_tokens=256, turns=6, tool_s=4.0
    )
    groups = Load(
        count=20_000, rate=1.0, prompt_tokens=768, out_tokens=512, samples=16, spread_s=1.0
    )
    few = replace(costs, kv_tokens=200_000)
    found = []
    for name, load in (("talks", talks), ("groups", groups)):
        for replicas in (10, 100):
            # At 85% of what they can do, with an update and the death of one replica on the way.
            most = capacity(few, 4, load) / 4 * replicas
            paced = replace(load, rate=0.85 * most / load.turns, count=1_000 + 100 * replicas)
            lasts = paced.count / most
            events = Events(
                commits=(lasts / 2,), commit_s=0.5, deaths=((lasts / 4, 1),), down_s=lasts / 4
            )
            sides: dict[str, Make] = dict(POLICIES)
            if name == "groups":
                sides["spread groups"] = functools.partial(cache_aware, group_s=0.0)
            if replicas > 16:
                for drawn in (1, 2, 8, 16):
                    sides[f"{drawn} drawn"] = functools.partial(cache_aware, num_drawn=drawn)
            for side, policy in sides.items():
                one = {"load": name, "policy": side}
                found.append(one | simulate(few, replicas, policy, paced, events))
                print(json.dumps(found[-1]), flush=True)
    for replicas, count in ((1_000, options.million // 10), (10_000, options.million)):
        most = capacity(few, 4, groups) / 4 * replicas
        paced = replace(groups, rate=0.85 * most, count=count)
        for side in ("cache_aware", "round_robin"):
            one = {"load": "groups", "policy": side}
            found.append(one | simulate(few, replicas, POLICIES[side], paced))
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Check, and then compare."""
    options = tyro.cli(Options, description=__doc__)
    try:
        report: dict[str, Any] = {"check": check(options)}
    except NotLikeReal as error:
        sys.exit(f"NotLikeReal: {error}")
    if not options.check_only:
        report |= {"costs": asdict(measured()), "fleets": fleets(options)}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    assert checkout.ROOT
    main()
