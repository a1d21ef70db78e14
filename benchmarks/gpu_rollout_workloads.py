"""The workloads of `benchmarks/gpu_rollout.py`, and the least time they could take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.protocol import Request, SamplingParams
from rollout.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`samples` of each prompt of random ids; output_lens: int64 [prompts * samples], fixed."""

    name: str
    prompts: int
    samples: int
    prompt_tokens: int
    output_lens: np.ndarray

    def requests(self, vocab_size: int, *, seed: int, shorten: int = 1) -> list[Request]:
        """Sampled at temperature 1 without a stop token. shorten: divisor of the lengths."""
        rng = np.random.default_rng(seed)
        prompts = rng.integers(0, vocab_size, (self.prompts, self.prompt_tokens), dtype=np.int32)
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


def make_workload(name: str) -> Workload:
    """`group`, `group8`, `single` or `tail`."""
    if name == "tail":
        lens = 400.0 * np.exp(0.9 * np.random.default_rng(1).standard_normal(256)) + 8
        return _workload(name, 256, 1, 512, np.minimum(lens, 4096).astype(np.int64))
    sizes = {"group": (64, 16, 1024), "group8": (16, 16, 512), "single": (1, 1, 256)}
    prompts, samples, length = sizes[name]
    return _workload(name, prompts, samples, 512, np.full(prompts * samples, length))


def _workload(
    name: str, prompts: int, samples: int, prompt_tokens: int, lens: np.ndarray
) -> Workload:
    return Workload(
        name=name,
        prompts=prompts,
        samples=samples,
        prompt_tokens=prompt_tokens,
        output_lens=lens,
    )


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
    seconds = 2 * model.params * work.prompts * work.prompt_tokens / flops
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
        prompts = int(running.any(1).sum() if share_prompts else running.sum())
        total += prompts * work.prompt_tokens + step * int(running.sum())
    return total
