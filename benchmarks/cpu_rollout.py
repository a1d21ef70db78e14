"""CPU rollout throughput against transformers' `generate`, in one run, same dtype.

    python benchmarks/cpu_rollout.py --dtype float32

8 prompts x 8 samples that share a few-shot prefix, 128 tokens in, 64 out, temperature 1. Ours
returns the logprob of every token, transformers none. The two alternate; medians and their
ratio are printed.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import checkout  # noqa: F401
import numpy as np
import torch
import tyro
from machine import describe

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.protocol import FlushCache, Request, SamplingParams
from rollout.launch import launch
from rollout.offline import generate, load_tokenizer
from rollout.requests.seeds import derive_seed

DEFAULT_MODEL = ".models/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = DEFAULT_MODEL
    """Model to run."""
    dtype: str = "float32"
    """float32 or bfloat16, for both sides."""
    prompts: int = 8
    """Distinct prompts."""
    samples: int = 8
    """Samples a prompt."""
    prompt_tokens: int = 128
    """Tokens of a prompt; the last 16 differ between prompts."""
    output_tokens: int = 64
    """Tokens sampled for each sequence."""
    repeats: int = 3
    """Measured runs of each side."""
    json: str | None = None
    """Write the figures to this file."""


def make_prompts(options: Options) -> list[list[int]]:
    """Prompts of equal length: a shared few-shot prefix and a tail of their own."""
    tokenizer = load_tokenizer(options.model)
    line = "Question: which is the largest of {}, {} and {}? Answer: {}\n"
    shared = "".join(line.format(i, i + 3, i + 1, i + 3) for i in range(40))
    prefix = tokenizer.encode(shared)[: options.prompt_tokens - 16]
    prompts = []
    for i in range(options.prompts):
        tail = tokenizer.encode(f" Sample {i * 7919}: and now for something different, " * 3)
        prompts.append([*prefix, *tail[:16]])
    return prompts


def ours(options: Options, prompts: list[list[int]]):
    """A function that runs the workload once through our engine; returns tokens sampled."""
    replica = launch(
        EngineConfig(
            model=options.model,
            device="cpu",
            dtype=options.dtype,
            context_length=1024,
            cache=CacheConfig(num_pages=2048),
            scheduler=SchedulerConfig(max_running=max(64, options.prompts * options.samples)),
        )
    )
    params = SamplingParams(max_new_tokens=options.output_tokens, ignore_eos=True)

    def run(seed: int) -> int:
        replica.send(FlushCache())
        requests = [
            Request(
                rid=f"{i}-{j}",
                group=str(i),
                prompt_ids=np.array(prompt, dtype=np.int32),
                sampling=params,
                seed=derive_seed(seed, i, j),
            )
            for i, prompt in enumerate(prompts)
            for j in range(options.samples)
        ]
        return sum(len(output.logprobs) for output in generate(replica, requests))

    return run


def theirs(options: Options, prompts: list[list[int]]):
    """The same workload through transformers' generate."""
    from engine.executor import read_checkpoint
    from trainer_bridge import load_causal_lm

    checkpoint = read_checkpoint(options.model)
    model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors).to(
        getattr(torch, options.dtype)
    )
    model.eval()
    ids = torch.tensor([p for p in prompts for _ in range(options.samples)])

    @torch.inference_mode()
    def run(seed: int) -> int:
        torch.manual_seed(seed)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=options.output_tokens,
            max_new_tokens=options.output_tokens,
            pad_token_id=0,
        )
        return out[:, ids.shape[1] :].numel()

    return run


def measure(options: Options) -> dict[str, object]:
    """Alternate both sides; medians of tokens per second."""
    prompts = make_prompts(options)
    sides = {"slipstream": ours(options, prompts), "transformers": theirs(options, prompts)}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(options.repeats + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            num_tokens = run(repeat)
            rate = num_tokens / (time.perf_counter() - started)
            if repeat > 0:  # the first run of each warms up
                rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "options": {**asdict(options), "model": Path(options.model).name, "json": None},
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_per_s": medians,
        "all": rates,
        "ratio": medians["slipstream"] / medians["transformers"],
    }


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options)
    result = measure(options)
    for name, rate in result["tokens_per_s"].items():
        print(f"{name:14s} {rate:8.1f} tok/s")
    print(f"ratio          {result['ratio']:8.2f}  ({result['machine']}, {options.dtype})")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
