"""Where a GRPO step goes when trainer and engine share one GPU.

    python benchmarks/colocated_step.py --model benchmarks/shapes/qwen2.5-1.5b.json --json out.json

The recipe's own loop with the plain trainer (float32 masters, bfloat16 autocast, AdamW) and random
weights: random prompts, replies of full length, rewards from a hash of the reply. Between
generation and training the engine is put to sleep; the push wakes it. The first step warms up and
is not counted. What counts is the share of a step that is neither generation nor training: scoring,
sleep, push, wake and everything else. Memory is that of the whole device, read every 20 ms.

The logprobs of engine and trainer are compared on every token first: a push that went wrong shows
there, and the benchmark fails. Without a GPU, the default model is a smoke test.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
import tyro
from machine import describe

from engine.protocol import IntArray
from recipes.actors.launch import launch_actor
from recipes.collecting.prompts import Prompts
from recipes.grpo import train
from recipes.run.ledger import Ledger
from recipes.run.opening import assemble
from recipes.run.report import PHASES
from recipes.run.run import Run
from recipes.settings.options import PlacementOptions, RolloutOptions, RunOptions
from recipes.trainers.model import load_trainer
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.types import Message, Problem

SMALL = Path(__file__).parent / "shapes" / "tiny.json"
POLL_S = 0.02
LARGEST_GAP = {"float32": 1e-4, "bfloat16": 0.05}
"""Mean |engine - trainer| logprob of a token that rounding explains, by dtype."""


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str = str(SMALL)
    """File like config.json; weights are random."""
    steps: int = 3
    """Counted steps."""
    prompts: int | None = None
    """Prompts a step; None takes 64 on a GPU."""
    samples: int = 8
    """Replies to each."""
    prompt_tokens: int | None = None
    """Tokens of a prompt; None takes 512 on a GPU."""
    reply_tokens: int | None = None
    """Tokens of a reply; None takes 512 on a GPU."""
    kv_memory_gb: float | None = None
    """Memory of the KV cache, GiB; None takes 10 on a GPU."""
    max_tokens_per_microbatch: int = 4096
    """Distinct prefix tokens the trainer computes at once."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    sleep: bool = True
    """Release the engine's memory while training."""
    target: float = 0.05
    """Largest share of a step that may be neither generation nor training, on a GPU."""
    json: str | None = None
    """Write the figures to this file."""

    def sized(self) -> Sizes:
        """What was not given, for this machine."""
        on_gpu = torch.cuda.is_available()
        return Sizes(
            prompts=self.prompts or (64 if on_gpu else 4),
            prompt_tokens=self.prompt_tokens or (512 if on_gpu else 16),
            reply_tokens=self.reply_tokens or (512 if on_gpu else 8),
            kv_memory_gb=self.kv_memory_gb or (10.0 if on_gpu else 0.05),
        )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a step on this machine."""

    prompts: int
    prompt_tokens: int
    reply_tokens: int
    kv_memory_gb: float


class RandomTask:
    """An `Environment` whose rewards are a hash of the reply: about half of each group is right."""

    name = "random"
    heldout_one_in = 1 << 30

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens

    def draw(self, rng: random.Random) -> Problem:
        """A number that the prompt is drawn from."""
        text = str(rng.getrandbits(48))
        return Problem(question=text, answer="", key=text)

    def messages(self, problem: Problem) -> list[Message]:
        """Not used: `RandomPrompts` writes the prompts."""
        return []

    def verify(self, reply: str, problem: Problem) -> float:
        """Half of all replies are right."""
        return float(zlib.crc32(reply.encode()) % 2)


class NoTokenizer:
    """Stands in for a tokenizer: prompts and replies are ids."""

    chat_template = ""

    def encode(self, text: str) -> list[int]:
        """Nothing."""
        return []

    def decode(self, ids: Any) -> str:
        """The ids themselves."""
        return " ".join(map(str, ids))

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Nothing."""
        return []


class RandomPrompts(Prompts):
    """Prompts of random ids; no token ends a reply."""

    def __init__(self, task: RandomTask, vocab_size: int, num_tokens: int) -> None:
        super().__init__(task, NoTokenizer(), [])
        self._vocab_size = vocab_size
        self._num_tokens = num_tokens

    def prompt_ids(self, problem: Problem) -> IntArray:
        """int32 [num_tokens], by the problem."""
        rng = np.random.default_rng(int(problem.question))
        return rng.integers(0, self._vocab_size, self._num_tokens, dtype=np.int32)


class WatchedLedger(Ledger):
    """A ledger that also keeps the most device memory that was in use in each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.peak: dict[str, int] = {}
        self._phase = "other"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """See `Ledger`."""
        outer, self._phase = self._phase, name
        try:
            with super().phase(name):
                yield
        finally:
            self._phase = outer

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read the memory of the device within."""
        if torch.cuda.is_available():
            self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            if self._thread.is_alive():
                self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            free, total = torch.cuda.mem_get_info()
            phase = self._phase
            self.peak[phase] = max(self.peak.get(phase, 0), total - free)


def open_bench(bench: Bench, folder: Path, ledger: Ledger) -> Run:
    """The recipe's run over random prompts."""
    sizes = bench.sized()
    options = RunOptions(
        task="random",
        model=bench.model,
        load_format="random",
        steps=bench.steps + 1,
        out=str(folder / "run"),
        eval_every=0,
        eval_prompts=1,
        checkpoint_every=0,
        rollout=RolloutOptions(
            prompts_per_step=sizes.prompts,
            samples=bench.samples,
            max_new_tokens=sizes.reply_tokens,
            kv_memory_gb=sizes.kv_memory_gb,
        ),
        optimizer=OptimizerOptions(
            lr=1e-6,
            max_tokens_per_microbatch=bench.max_tokens_per_microbatch,
            gradient_checkpointing=bench.gradient_checkpointing,
        ),
        placement=PlacementOptions(sleep=bench.sleep),
    )
    actor = launch_actor(options)
    task = RandomTask(sizes.reply_tokens)
    run = assemble(
        options,
        ledger,
        environment=task,
        actor=actor,
        tokenizer=NoTokenizer(),  # type: ignore[arg-type]
        trainer=load_trainer(options, actor),
    )
    run.prompts = RandomPrompts(task, actor.state().vocab_size, sizes.prompt_tokens)
    run.prompts.stop_ids = []
    return run


def measure(bench: Bench) -> dict[str, Any]:
    """Run the steps; figures of the counted ones."""
    ledger = WatchedLedger()
    with (
        tempfile.TemporaryDirectory() as folder,
        open_bench(bench, Path(folder), ledger) as run,
        ledger.watching(),
    ):
        train(run)
        rows = run.folder.read_metrics()[1:]
        dtype = run.actor.state().dtype
    steps = [{phase: row[f"timing_s/{phase}"] for phase in (*PHASES, "step")} for row in rows]
    seconds = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    gap = max(row["sampling/sampling_logp_difference/mean"] for row in rows)
    return {
        "options": {**asdict(bench), "model": Path(bench.model).name, "json": None},
        "sizes": asdict(bench.sized()),
        "machine": describe(),
        "torch": torch.__version__,
        "dtype": dtype,
        "rollout_tokens": rows[0]["perf/rollout_tokens"],
        "computed_tokens": rows[0]["perf/trainer_computed_tokens"],
        "grad_norm": [row["grad_norm"] for row in rows],
        "logprob_difference_mean": gap,
        "seconds": seconds,
        "steps": steps,
        "neither": statistics.median(map(neither, steps)),
        "peak_bytes": ledger.peak,
    }


def neither(step: dict[str, float]) -> float:
    """Share of a step that is neither generation nor training."""
    return 1 - (step["generate"] + step["train"]) / step["step"]


def mistakes(result: dict[str, Any]) -> list[str]:
    """What must not be so, whatever the times are."""
    found = []
    limit = LARGEST_GAP[result["dtype"].removeprefix("torch.")]
    gap = result["logprob_difference_mean"]
    if not gap < limit:
        found.append(f"engine and trainer differ by {gap:.1e} a token, more than {limit:.0e}")
    if not all(0 < norm < float("inf") for norm in result["grad_norm"]):
        found.append(f"gradient norms {result['grad_norm']}")
    return found


def show(result: dict[str, Any]) -> None:
    """Print a table."""
    print(f"{result['machine']}, torch {result['torch']}, {result['dtype']}: {result['sizes']}")
    print(f"{'':10s}" + "".join(f"{name:>10s}" for name in (*PHASES, "step")) + f"{'neither':>10s}")
    for name, step in (*enumerate(result["steps"], start=2), ("median", result["seconds"])):
        cells = "".join(f"{step[phase]:10.3f}" for phase in (*PHASES, "step"))
        print(f"{name!s:10s}{cells}{neither(step):10.1%}")
    if result["peak_bytes"]:
        peaks = "".join(f"{result['peak_bytes'].get(p, 0) / 2**30:10.2f}" for p in PHASES)
        print(f"{'peak GiB':10s}{peaks}")
    rate = result["rollout_tokens"] / result["seconds"]["generate"]
    print(
        f"{rate:.0f} sampled tokens/s; engine and trainer differ by "
        f"{result['logprob_difference_mean']:.1e} a token; neither generation nor training: "
        f"{result['neither']:.1%}"
    )


def main() -> int:
    """Measure and print; 1 for a wrong result, or on a GPU for a share above the target."""
    bench = tyro.cli(Bench)
    result = measure(bench)
    show(result)
    if bench.json:
        Path(bench.json).write_text(json.dumps(result, indent=2) + "\n")
    found = mistakes(result)
    if torch.cuda.is_available() and result["neither"] > bench.target:
        found.append(f"{result['neither']:.1%} is neither, more than {bench.target:.0%}")
    for mistake in found:
        print(f"FAILED: {mistake}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
