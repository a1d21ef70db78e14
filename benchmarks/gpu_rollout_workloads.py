"""The workloads of `benchmarks/gpu_rollout.py`, and the least time they could take."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.protocol import Request, SamplingParams
from rollout.requests.seeds import derive_seed

WorkloadName = Literal["group", "group8", "moe", "single", "tail", "wa", "wb_long"]

_GRIDS = {
    "group": (64, 16, 512, 1024),
    "group8": (16, 16, 512, 512),
    "moe": (8, 16, 512, 256),
    "single": (1, 1, 512, 256),
    "wb_long": (64, 16, 1024, 1024),
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`samples` of each prompt of random ids. prompt_lens: int64 [prompts]; output_lens: int64
    [prompts * samples], fixed."""

    name: str
    samples: int
    prompt_lens: np.ndarray
    output_lens: np.ndarray

    @property
    def prompts(self) -> int:
        return len(self.prompt_lens)

    def requests(self, vocab_size: int, *, seed: int, shorten: int = 1) -> list[Request]:
        """Sampled at temperature 1 without a stop token. shorten: divisor of the lengths."""
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, vocab_size, int(self.prompt_lens.sum()), dtype=np.int32)
        prompts = np.split(ids, np.cumsum(self.prompt_lens)[:-1])
        return [
            Request(
                rid=f"{seed}-{row}",
                group=f"{seed}-{row // self.samples}",
                prompt_ids=prompts[row // self.samples],
                sampling=SamplingParams(
                    max_new_tokens=max(int(length) // shorten, 4), ignore_eos=True
                ),
                seed=derive_seed(seed, row),
            )
            for row, length in enumerate(self.output_lens)
        ]


def make_workload(name: WorkloadName) -> Workload:
    """A workload by its name; lengths are always the same.

    group, group8: samples of prompts of 512 tokens. wb_long: the same with 1,024 in and out.
    single: one request. tail: lognormal output lengths. wa: 256 prompts, 100 to 1,024 tokens in
    and out, the lengths of nano-vllm's benchmark (142,827 in, 133,966 out).
    """
    if name == "tail":
        lens = 400.0 * np.exp(0.9 * np.random.default_rng(1).standard_normal(256)) + 8
        return _workload(name, 1, np.full(256, 512), np.minimum(lens, 4096).astype(np.int64))
    if name == "wa":
        return _workload(name, 1, *_nano_lengths())
    prompts, samples, given, asked = _GRIDS[name]
    return _workload(name, samples, np.full(prompts, given), np.full(prompts * samples, asked))


def _workload(name: str, samples: int, given: np.ndarray, asked: np.ndarray) -> Workload:
    return Workload(name=name, samples=samples, prompt_lens=given, output_lens=asked)


def _nano_lengths(count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output lengths as nano-vllm's bench.py draws them: Python's generator with
    seed 0, every prompt's ids between its length and the next one's."""
    rng = random.Random(0)
    prompt_lens = []
    for _ in range(count):
        prompt_lens.append(rng.randint(100, 1024))
        for _ in range(prompt_lens[-1]):
            rng.randint(0, 10000)
    return np.array(prompt_lens), np.array([rng.randint(100, 1024) for _ in range(count)])


@dataclass(frozen=True, kw_only=True)
class ModelBytes:
    """What a step must move and multiply. params: those of the matrices, head included."""

    params: int
    weight_bytes: int
    kv_bytes_per_token: int


def floor_seconds(
    work: Workload, model: ModelBytes, *, copy_bytes_s: float, flops: float, share_prompts: bool
) -> float:
    """The decode bound summed over steps, plus the prompts' matrix products.

    A step of B rows takes max(weights / bandwidth, 2 * params * B / flops) plus its KV bytes
    over the bandwidth. share_prompts: the KV of a prompt is read once for all its samples.
    """
    seconds = 2 * model.params * int(work.prompt_lens.sum()) / flops
    for running in _running_by_step(work):
        rows = int(running.sum())
        weights = max(model.weight_bytes / copy_bytes_s, 2 * model.params * rows / flops)
        seconds += weights
    return seconds + _kv_tokens(work, share_prompts) * model.kv_bytes_per_token / copy_bytes_s


def _running_by_step(work: Workload) -> Iterator[np.ndarray]:
    """bool [prompts, samples] of each decode step; the first token comes with the prompt."""
    lens = work.output_lens.reshape(work.prompts, work.samples)
    for step in range(1, int(lens.max())):
        yield lens > step


def _kv_tokens(work: Workload, share_prompts: bool) -> int:
    total = 0
    for step, running in enumerate(_running_by_step(work), start=1):
        readers = running.any(1) if share_prompts else running.sum(1)
        total += int((readers * work.prompt_lens).sum()) + step * int(running.sum())
    return total
