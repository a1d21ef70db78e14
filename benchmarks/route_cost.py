"""What it costs to keep and return routes:

    python benchmarks/route_cost.py --model CONFIG [--prompts 8 --samples 16] [--json FILE]

Engines that keep no routes, that keep them though nobody asks, and whose requests all ask take
turns, each built anew, several times in one process, on random weights if there are no others.
Prompts are new each time and the same for all three. The figures are output tokens per second, the
median of the turns, over those of the first.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import numpy as np
import torch
import tyro
from machine import describe

from engine.config import EngineConfig, SchedulerConfig
from engine.protocol import Request, SamplingParams
from rollout.launch import launch
from rollout.replica.base import Replica

Side = Literal["off", "kept", "returned"]
SIDES: tuple[Side, ...] = ("off", "kept", "returned")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    """A config.json of a model with experts, or a folder with its weights."""
    load_format: Literal["auto", "random"] = "random"
    """Where the weights come from."""
    prompts: int = 8
    """Prompts of a run."""
    samples: int = 16
    """Samples of each."""
    given: int = 512
    """Tokens of a prompt."""
    asked: int = 1024
    """Output tokens of a sample."""
    turns: int = 3
    """Runs of each side."""
    json: str | None = None
    """Write the figures to this file."""


def requests(options: Options, vocab_size: int, seed: int, *, routed: bool) -> list[Request]:
    """A run's requests."""
    rng = np.random.default_rng(seed)
    shape = (options.prompts, options.given)
    prompts = rng.integers(0, vocab_size, shape, dtype=np.int32)
    sampling = SamplingParams(max_new_tokens=options.asked, ignore_eos=True)
    return [
        Request(
            rid=f"{seed}-{row}-{sample}",
            group=f"{seed}-{row}",
            prompt_ids=prompts[row],
            sampling=sampling,
            seed=seed * 1000 + row * options.samples + sample,
            return_routed_experts=routed,
        )
        for row in range(options.prompts)
        for sample in range(options.samples)
    ]


def timed(replica: Replica, asked: list[Request]) -> float:
    """Output tokens per second."""
    started, num_tokens, num_routes = time.perf_counter(), 0, 0
    replica.submit(asked)
    while not replica.idle():
        for output in replica.step():
            num_tokens += len(output.token_ids)
            num_routes += output.routed_experts is not None
    wanted = len(asked) if asked[0].return_routed_experts else 0
    assert num_routes == wanted, f"{num_routes} outputs have routes"
    return num_tokens / (time.perf_counter() - started)


def run(options: Options, side: Side, turn: int) -> float:
    """One run of a side, after a short one."""
    config = EngineConfig(
        model=options.model,
        load_format=options.load_format,
        return_routed_experts=side != "off",
        context_length=options.given + options.asked,
        scheduler=SchedulerConfig(max_running=options.prompts * options.samples),
    )
    replica = launch(config)
    vocab_size, routed = replica.state().vocab_size, side == "returned"
    short = Options(**{**asdict(options), "asked": max(options.asked // 16, 4)})
    timed(replica, requests(short, vocab_size, 100 + turn, routed=routed))
    rate = timed(replica, requests(options, vocab_size, turn, routed=routed))
    replica.close()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rate


def main() -> None:
    """See the module."""
    options = tyro.cli(Options)
    rates: dict[Side, list[float]] = {side: [] for side in SIDES}
    for turn in range(options.turns):
        for side in SIDES:
            rates[side].append(run(options, side, turn))
            print(f"{side}: {rates[side][-1]:,.1f} tok/s", flush=True)
    off = statistics.median(rates["off"])
    ratios = {side: statistics.median(rates[side]) / off for side in SIDES}
    print(", ".join(f"{side} / off {ratio:.4f}" for side, ratio in ratios.items()))
    report: dict[str, Any] = {
        "machine": describe(),
        "torch": torch.__version__,
        "options": {k: v for k, v in asdict(options).items() if k not in ("json", "model")}
        | {"model": Path(options.model).stem},
        "tokens_per_s": rates,
        "ratios": ratios,
    }
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
