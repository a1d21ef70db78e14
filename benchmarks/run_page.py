"""What the page of a training run costs: an open page beside a step, and a list of many replies.

    python benchmarks/run_page.py --json benchmarks/results/run-page-epyc.json

Steps of the default run of `recipes/grpo.py` are taken in turns with the page open, which a reader
follows live, and with both stopped. Wall time of steps on a machine with other work says little
beside the processor time of the page and its reader over that of the step. Then 10,000 replies are
listed, and a step's replies of the largest size are written.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import tyro
from machine import describe
from process_times import seconds_by_role

from engine.protocol import VersionSpan
from recipes.grpo import train
from recipes.run.dashboard import HOST, PAGE, Page
from recipes.run.display import Display, Row
from recipes.run.kept_rollouts import TOKENS_A_STEP, rollout_lines
from recipes.run.ledger import Ledger
from recipes.run.opening import open_run
from recipes.settings.options import DEFAULT_MODEL, RunOptions
from recipes.types import Group, Problem, Trajectory
from rollout.dashboard.rollouts import RolloutQuery
from rollout.dashboard.runs.run_source import RunSource

READER = """
import sys, urllib.request
with urllib.request.urlopen(sys.argv[1]) as stream:
    while stream.readline():
        pass
"""
MEASURED = ("wall_s", "run_s", "page_s", "reader_s")


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    model: str = str(DEFAULT_MODEL)
    """Of the run."""
    pairs: int = 6
    """Steps with the page open, and as many without."""
    minutes: float | None = None
    """Take fewer where so much time is over."""
    json: str | None = None
    """Write the result to this file."""


class Turns(Display):
    """A display that opens and shuts the page after every step, and notes what each took."""

    def __init__(self, pids: dict[str, int], steps: int) -> None:
        super().__init__("run_page", steps)
        self.steps: list[dict[str, Any]] = []
        self._pids = pids
        self._open = True
        self._before = self._times()

    def show(self, row: Row) -> None:
        """The end of a step; the first one is not counted."""
        super().show(row)
        after = self._times()
        step = {name: after[name] - self._before[name] for name in MEASURED}
        if row["step"] > 1:
            self.steps.append({"open": self._open, **step})
            print(json.dumps(self.steps[-1]), flush=True)
        self._open = not self._open
        for pid in self._pids.values():
            os.kill(pid, signal.SIGCONT if self._open else signal.SIGSTOP)
        self._before = self._times()

    def _times(self) -> dict[str, float]:
        of = {f"{name}_s": sum(seconds_by_role(pid).values()) for name, pid in self._pids.items()}
        return {"wall_s": time.perf_counter(), "run_s": time.process_time(), **of}


def beside_steps(options: Options, folder: Path) -> dict[str, Any]:
    """Steps in turns, with the page open and shut."""
    steps = 2 * options.pairs + 1
    run_options = RunOptions(
        model=options.model,
        steps=steps,
        minutes=options.minutes,
        out=str(folder),
        eval_every=0,
        eval_prompts=1,
        checkpoint_every=0,
    )
    with open_run(run_options, Ledger()) as run:
        with socket.create_server((HOST, 0)) as listener:
            page = Page(listener, folder, print)
        url = f"http://{HOST}:{page.port}{PAGE}/api/live"
        reader = subprocess.Popen([sys.executable, "-c", READER, url])
        run.begin()
        run.display = turns = Turns({"page": page.pid, "reader": reader.pid}, steps)
        try:
            train(run)
        finally:
            for pid in (page.pid, reader.pid):
                os.kill(pid, signal.SIGCONT)
            page.close()
            reader.wait(30)
    return _summary(turns.steps)


def _summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str, *, is_open: bool) -> float:
        return float(statistics.median(step[name] for step in steps if step["open"] is is_open))

    told: dict[str, Any] = {
        "pairs": len(steps) // 2,
        **{f"{name}_open": round(median(name, is_open=True), 4) for name in MEASURED},
        "wall_s_shut": round(median("wall_s", is_open=False), 4),
        "run_s_shut": round(median("run_s", is_open=False), 4),
    }
    beside = told["page_s_open"] + told["reader_s_open"]
    told["processor_share_of_page"] = round(told["page_s_open"] / told["run_s_open"], 5)
    told["processor_share_of_page_and_reader"] = round(beside / told["run_s_open"], 5)
    told["steps"] = [{k: round(float(v), 4) for k, v in step.items()} for step in steps]
    return told


def made_group(tokens: int, samples: int, seed: int) -> Group:
    """A group of long replies."""
    rng = np.random.default_rng(seed)
    reply = Trajectory(
        prompt_ids=rng.integers(0, 256, 200).astype(np.int32),
        response_ids=rng.integers(0, 256, tokens).astype(np.int32),
        rollout_logprobs=-rng.random(tokens).astype(np.float32),
        spans=(VersionSpan(1, 0, tokens),),
        text=" ".join(str(n) for n in rng.integers(0, 10_000, tokens)),
        truncated=False,
        reward=float(rng.random()),
        correct=0.0,
    )
    replies = tuple(replace(reply, reward=float(reward)) for reward in rng.random(samples))
    return Group(problem=Problem(question="", answer="7", key=""), trajectories=replies)


def many_replies(folder: Path, num: int = 10_000) -> dict[str, Any]:
    """Processor milliseconds of writing a step of the largest size, and of pages of a list of
    `num`."""
    token_bytes = {token: b"%d " % token for token in range(256)}
    largest = [made_group(TOKENS_A_STEP // 32, 8, seed) for seed in range(4)]
    told = {"write_a_full_step_ms": _ms(lambda: rollout_lines(1, largest, token_bytes, num=4))}
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with (folder / "rollouts.jsonl").open("wb") as file:
        for step in range(num // 32):
            groups = [made_group(100, 8, 4 * step + place) for place in range(4)]
            file.write(rollout_lines(step, groups, token_bytes, num=4))
    told["file_bytes"] = (folder / "rollouts.jsonl").stat().st_size
    source = RunSource(folder)
    first = RolloutQuery()

    def ask(query: RolloutQuery) -> Callable[[], object]:
        return lambda: asyncio.run(source.rollouts(query))

    began = time.process_time()
    told["replies"] = asyncio.run(source.rollouts(first)).total
    told["open_ms"] = round(1000 * (time.process_time() - began), 2)
    told["first_page_ms"] = _ms(ask(first))
    told["by_reward_ms"] = _ms(ask(RolloutQuery(sort="reward", offset=num // 2)))
    told["by_text_ms"] = _ms(ask(RolloutQuery(text="9999 1")))
    told["group_ms"] = _ms(lambda: asyncio.run(source.rollout_group("7-2")))
    return told


def _ms(work: Callable[[], object], times: int = 9) -> float:
    """Median of processor time, of all threads: nothing waits here but for the processor."""
    took = []
    for _ in range(times):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return round(1000 * statistics.median(took), 2)


def main() -> None:
    """Measure both; print and write the result."""
    options = tyro.cli(Options, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"machine": describe(), "list": many_replies(Path(folder, "many"))}
        print(json.dumps(result["list"]), flush=True)
        result["step"] = beside_steps(options, Path(folder, "run"))
    told = json.dumps(result, indent=2)
    print(told)
    if options.json:
        Path(options.json).write_text(f"{told}\n")


if __name__ == "__main__":
    main()
