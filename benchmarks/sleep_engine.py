"""The engine that `benchmarks/sleep.py` puts to sleep, and the training meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import CacheConfig, EngineConfig, MemoryConfig, SchedulerConfig
from engine.protocol import (
    BeginUpdate,
    FlushCache,
    ReleaseMemory,
    Reply,
    Request,
    ResumeMemory,
    SamplingParams,
)
from rollout.launch import launch
from rollout.replica.inline import InlineReplica

SMALL = Path(__file__).parent / "shapes" / "tiny.json"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    models: tuple[str, ...] = (str(SMALL),)
    """Files like config.json; weights are random."""
    rows: int = 64
    """Requests that decode at once."""
    tokens: int = 32
    """Tokens each samples."""
    cycles: int = 20
    """Release and resume this often, to see that memory stays flat."""
    away: float = 0.5
    """Seconds of training between a release and a resume."""
    memory_fraction: float = 0.85
    """Share of free memory for the KV pool."""
    max_running: int = 256
    """Most sequences running at once."""
    json: str | None = None
    """Write the figures to this file."""


Figures = dict[str, Any]


class Bench:
    """One engine, the batch it is asked for, and what it answered first."""

    def __init__(self, options: Options, model: str, **memory: Any) -> None:
        self.options, self.model = options, model
        cuda = torch.cuda.is_available()
        config = EngineConfig(
            model=model,
            load_format="random",
            context_length=4096 if cuda else None,
            memory=MemoryConfig(**memory),
            cache=CacheConfig(
                memory_fraction=options.memory_fraction,
                num_pages=None if cuda else 600,
            ),
            scheduler=SchedulerConfig(max_running=options.max_running if cuda else options.rows),
        )
        replica = launch(config)
        assert isinstance(replica, InlineReplica)
        self.replica = replica
        self.vocab_size = replica.state().vocab_size
        self._num_batches = 0

    def batch(self, max_new: int | None = None) -> list[Request]:
        """Greedy requests, the same prompts every time."""
        rng = np.random.default_rng(0)
        self._num_batches += 1
        sampling = SamplingParams(
            temperature=0.0, max_new_tokens=max_new or self.options.tokens, ignore_eos=True
        )
        return [
            Request(
                rid=f"{self._num_batches}-{row}",
                prompt_ids=rng.integers(10, self.vocab_size, 100, dtype=np.int32),
                sampling=sampling,
                seed=row,
            )
            for row in range(self.options.rows)
        ]

    def run(self, max_new: int | None = None) -> tuple[list[bytes], list[float]]:
        """Tokens and logprob bits of the batch from an empty cache, and seconds of each step."""
        self.replica.send(FlushCache())
        requests = self.batch(max_new)
        found: dict[str, bytes] = {}
        steps: list[float] = []
        self.replica.submit(requests)
        while not self.replica.idle():
            started = time.perf_counter()
            for output in self.replica.step():
                if output.finish is not None:
                    assert output.finish.type == "length", output.finish
                    found[output.rid] = output.token_ids.tobytes() + output.logprobs.tobytes()
            steps.append(time.perf_counter() - started)
        return [found[request.rid] for request in requests], steps

    def send(self, command: ReleaseMemory | ResumeMemory) -> tuple[Reply, float]:
        """Send one command; its reply, and seconds as its caller sees them."""
        started = time.perf_counter()
        reply = self.replica.send(command)
        return reply, time.perf_counter() - started

    def publish(self, version: int, tensors: list[tuple[str, torch.Tensor]]) -> float:
        """Update in process; seconds."""
        started = time.perf_counter()
        self.replica.update_weights_inproc(BeginUpdate(version=version), tensors)
        return time.perf_counter() - started


def train(seconds: float) -> None:
    """Keep the GPU busy and little of its memory."""
    if not torch.cuda.is_available():
        return
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a, out=out)
        torch.cuda.synchronize()


def device_used() -> int:
    """Bytes of the device in use by anybody; of a CPU nothing is known."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def first_steps(steps: list[float], count: int = 4) -> float:
    """Seconds of the first steps: prefill, its result, and the first decode steps."""
    return sum(steps[:count])
