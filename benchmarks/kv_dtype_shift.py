"""How far fp8 KV moves the logprobs of sampled tokens.

    python benchmarks/kv_dtype_shift.py --json benchmarks/results/kv-dtype-shift-cpu-xeon.json

An engine with KV as it is computed answers the questions at temperature 1; then one with KV of
`--kv-dtype` scores the same tokens after the same prompts, and so does the first engine again: what
that differs by is no shift of the KV. Of each token the difference of the two logprobs counts: its
mean and largest magnitude, and k3 = exp(d) - 1 - d, whose mean estimates the KL divergence of
the first policy from the second (Schulman, "Approximating KL divergence", 2020).

Runs on a CPU in under a minute, or on a GPU; the default model is what `make setup` brings.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import tyro
from machine import describe

from engine.config import CacheConfig, DType, EngineConfig, KVDType
from engine.protocol import Request, RequestOutput, SamplingParams
from recipes.settings.options import DEFAULT_MODEL
from rollout.launch import launch
from rollout.offline import Tokenizer, derive_seed, generate, load_tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "Write a story about the sea.",
    "How do I multiply two numbers of three digits by hand?",
    "Explain rain to a child.",
    "Who wrote Hamlet, and what happens in it?",
    "Give me a recipe for bread, step by step.",
    "What is the difference between a list and a tuple in Python?",
    "Why is the sky blue?",
)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = str(DEFAULT_MODEL)
    """GGUF file or Hugging Face folder."""
    kv_dtype: KVDType = "fp8_e4m3"
    """What the scoring engine keeps keys and values as."""
    dtype: DType = "float32"
    """Of both engines."""
    seeds: int = 3
    """How often every question is answered."""
    tokens: int = 144
    """Tokens of an answer."""
    json: str | None = None
    """Write the figures to this file."""


def engine(options: Options, kv_dtype: KVDType) -> Any:
    """An engine in this process."""
    cache = CacheConfig(num_pages=2048, kv_dtype=kv_dtype)
    return launch(
        EngineConfig(
            model=options.model, dtype=options.dtype, context_length=1024, seed=0, cache=cache
        )
    )


def prompts(tokenizer: Tokenizer) -> list[np.ndarray]:
    """The questions as a chat's first turn."""
    return [
        np.array(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True
            ),
            dtype=np.int32,
        )
        for question in QUESTIONS
    ]


def questions(options: Options, ids: list[np.ndarray]) -> list[Request]:
    """Every question once for each seed."""
    sampling = SamplingParams(max_new_tokens=options.tokens, ignore_eos=True)
    return [
        Request(
            rid=f"{seed}-{index}",
            prompt_ids=prompt,
            sampling=sampling,
            seed=derive_seed(seed, index),
        )
        for seed in range(options.seeds)
        for index, prompt in enumerate(ids)
    ]


def score(replica: Any, asked: list[Request], answers: list[RequestOutput]) -> list[np.ndarray]:
    """Logprobs of the answers' tokens, float32 [tokens] each."""
    requests = [
        Request(
            rid=request.rid,
            prompt_ids=np.concatenate([request.prompt_ids, answer.token_ids]).astype(np.int32),
            sampling=SamplingParams(max_new_tokens=1),
            seed=0,
            prompt_logprob_start=len(request.prompt_ids),
        )
        for request, answer in zip(asked, answers, strict=True)
    ]
    found = [output.prompt_logprobs for output in generate(replica, requests)]
    return [np.asarray(logprobs) for logprobs in found]


def figures(before: list[np.ndarray], after: list[np.ndarray]) -> dict[str, float]:
    """Of all tokens together."""
    change = np.concatenate(after).astype(np.float64) - np.concatenate(before)
    return {
        "mean": float(np.abs(change).mean()),
        "max": float(np.abs(change).max()),
        "k3": float((np.expm1(change) - change).mean()),
    }


def measure(options: Options) -> dict[str, Any]:
    """The shift of each seed and of all, beside that of scoring anew."""
    asked = questions(options, prompts(load_tokenizer(options.model)))
    plain = engine(options, "auto")
    try:
        answers = generate(plain, asked)
        again = score(plain, asked, answers)
    finally:
        plain.close()
    changed = engine(options, options.kv_dtype)
    try:
        shifted = score(changed, asked, answers)
    finally:
        changed.close()
    sampled = [np.asarray(answer.logprobs) for answer in answers]
    own = len(QUESTIONS)
    by_seed = [
        figures(again[first : first + own], shifted[first : first + own])
        for first in range(0, len(asked), own)
    ]
    return {
        "tokens": sum(len(part) for part in sampled),
        "shift": figures(again, shifted),
        "shift_by_seed": by_seed,
        "scored_anew": figures(sampled, again),
    }


def main() -> int:
    """Measure and print."""
    options = tyro.cli(Options)
    found = measure(options)
    for name in ("shift", "scored_anew"):
        row = found[name]
        print(f"{name:<12} mean {row['mean']:.5f}  max {row['max']:.4f}  k3 {row['k3']:.6f}")
    means = ", ".join(f"{row['mean']:.4f}" for row in found["shift_by_seed"])
    print(f"{found['tokens']:,} tokens; means by seed {means}")
    if options.json:
        asked = asdict(options) | {"model": Path(options.model).name}
        del asked["json"]
        report = {"machine": describe(), "options": asked, **found}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
