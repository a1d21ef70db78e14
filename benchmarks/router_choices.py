"""Part `choices` of `benchmarks/router.py`: what a decision costs, and what it is worth.

cost: microseconds of a choice, the index being full: 8 workers and 1e4 prefixes, 1,000 and 1e6.
hits: 8 conversations of 16 turns over 8 workers, whose caches together hold all of them once and
    half as much again, least recently used first out: the share of prompts' bytes that the chosen
    worker had, beside round robin's.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import OrderedDict
from dataclasses import dataclass

from rollout.router.choice.ask import Ask, Policy
from rollout.router.choice.blocks import BLOCK_BYTES, blocks_of
from rollout.router.choice.cache_aware import CacheAware
from rollout.router.choice.plain_policies import RoundRobin
from rollout.router.choice.prefix_index import holder_of


@dataclass
class Load:
    """A worker of no server."""

    url: str
    num_open: int = 0
    num_bytes: int = 0
    epoch: int = 0


def _prompt(draw: random.Random, shared: bytes, blocks: int) -> bytes:
    return shared + draw.randbytes(blocks * BLOCK_BYTES // 2).hex().encode()


def cost(
    num_workers: int, num_prefixes: int, *, count: int = 5_000, rounds: int = 7
) -> dict[str, float]:
    """Processor time of a choice: the median and the 99th percentile of `count`, of the quietest
    and of the middle one of `rounds`, since what shares a core slows it down by up to three."""
    draw = random.Random(0)
    workers = [Load(f"http://worker-{n}:1", draw.randrange(8)) for n in range(num_workers)]
    policy = CacheAware(seed=0, most_blocks=num_prefixes)
    systems = [_prompt(draw, b"", 4) for _ in range(64)]
    filled = 0
    while filled < num_prefixes:
        # The policy numbers workers as they stand in its candidates.
        holder = holder_of(draw.randrange(num_workers), 0)
        blocks = blocks_of(_prompt(draw, draw.choice(systems), 8))
        policy.index.insert(blocks, policy.index.num_known(blocks), holder)
        filled += 8
    found = []
    for _ in range(rounds):
        prompts = [bytearray(_prompt(draw, draw.choice(systems), 4)) for _ in range(count)]
        times = []
        for prompt in prompts:
            # Fresh from its body, as a router has it.
            ask = Ask(bytes(prompt))
            # Of this thread alone: what else the machine does is no part of a decision.
            start = time.thread_time()
            policy.choose(ask, workers)
            times.append(1e6 * (time.thread_time() - start))
        times.sort()
        found.append((times[int(count * 0.99)], times[count // 2]))
    found.sort()
    (quiet_p99, quiet_p50), (p99, p50) = found[0], found[rounds // 2]
    return {
        "p50_us": quiet_p50,
        "p99_us": quiet_p99,
        "middle_p50_us": p50,
        "middle_p99_us": p99,
    }


def hits(policy: Policy, *, groups: int = 8, turns: int = 16, num_workers: int = 8) -> float:
    """The share of bytes of prompts that were in the chosen worker's cache."""
    draw = random.Random(1)
    workers = [Load(f"http://w{n}:1") for n in range(num_workers)]
    caches: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in workers]
    talks = [_prompt(draw, b"", 8) for _ in range(groups)]
    # Together they hold what all conversations have at their end, and half as much again.
    room = int(1.5 * groups * (8 + 2 * turns) / num_workers)
    hit = total = 0
    for _ in range(turns):
        for group in draw.sample(range(groups), groups):
            prompt = talks[group]
            cache = caches[policy.choose(Ask(prompt), workers).place]
            blocks = [prompt[:at] for at in range(BLOCK_BYTES, len(prompt) + 1, BLOCK_BYTES)]
            hit += BLOCK_BYTES * sum(block in cache for block in blocks)
            total += len(prompt)
            for block in reversed(blocks):
                cache[block] = None
                cache.move_to_end(block)
            while len(cache) > room:
                cache.popitem(last=False)
            talks[group] = _prompt(draw, prompt, 2)
    return hit / total


def measure() -> dict[str, object]:
    """All of it."""
    # Turns are apart in time, so that none counts as the same group's.
    clock = iter(range(0, 1 << 40, 60))
    aware = statistics.mean(
        hits(CacheAware(seed=seed, clock=lambda: float(next(clock)))) for seed in range(4)
    )
    plain = hits(RoundRobin())
    return {
        "8 workers, 1e4 prefixes": cost(8, 10_000),
        "1000 workers, 1e6 prefixes": cost(1000, 1_000_000),
        "hits": {"cache_aware": aware, "round_robin": plain, "ratio": aware / plain},
    }
