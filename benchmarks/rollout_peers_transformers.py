"""transformers' continuous batching as a peer of `benchmarks/rollout_peers.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rollout_peers_calls import Answer, Ask, Run
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

# Else most of the machine's memory, which takes a minute to clear. Blocks have 256 tokens.
CPU_SIZES = {"num_blocks": 64, "max_batch_tokens": 2048}
NO_TOKEN = -1


@contextmanager
def opened(
    config: Path, *, longest: int, max_rows: int, logprobs: bool, timeout_s: float
) -> Iterator[Run]:
    """A model of random weights behind a manager that batches continuously."""
    model = random_model(config)
    generation = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=NO_TOKEN, pad_token_id=0
    )
    with model.continuous_batching_context_manager(
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(
            return_logprobs=logprobs,
            max_requests_per_batch=max_rows,
            **({} if torch.cuda.is_available() else CPU_SIZES),
        ),
        workload_hints=WorkloadHints(
            max_prompt_length=longest, max_generated_length=longest, num_requests=max_rows
        ),
        timeout=60.0,
    ) as manager:
        yield lambda asks: _answer(manager, asks, timeout_s)


def random_model(config: Path) -> Any:
    """Normal(0, 0.02) weights, bfloat16 on a GPU, drawn where they stay."""
    on_gpu = torch.cuda.is_available()
    settings = AutoConfig.from_pretrained(config)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=torch.bfloat16 if on_gpu else torch.float32
        )
    return model.eval()


def _answer(manager: Any, asks: list[Ask], timeout_s: float) -> list[Answer]:
    deadline = time.monotonic() + timeout_s
    order = {
        manager.add_request(
            ask.prompt_ids, max_new_tokens=ask.num_tokens, eos_token_id=NO_TOKEN
        ): index
        for index, ask in enumerate(asks)
    }
    answers: dict[int, Answer] = {}
    while len(answers) < len(asks):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(answers)} of {len(asks)} answers after {timeout_s:.0f} s")
        result = manager.get_result(timeout=1.0)
        if result is None and not manager.is_running():
            raise RuntimeError("the generation thread ended")
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(f"{result.request_id}: {result.error}")
            answers[order[result.request_id]] = Answer(
                len(result.generated_tokens), len(result.logprobs)
            )
    return [answers[index] for index in range(len(asks))]
