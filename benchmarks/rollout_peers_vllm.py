"""vLLM as a peer of `benchmarks/rollout_peers.py`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollout_peers_calls import Answer, Ask, Run
from vllm import LLM, SamplingParams

MEMORY_SHARE = 0.88


@contextmanager
def opened(
    config: Path, *, longest: int, max_rows: int, logprobs: bool, timeout_s: float
) -> Iterator[Run]:
    """An offline engine with dummy weights. Its deadline is that of the process it runs in."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config, Path(folder) / "config.json")
        engine = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=longest + 16,
            max_num_seqs=max_rows,
            enable_prefix_caching=True,
            gpu_memory_utilization=MEMORY_SHARE,
        )
        yield lambda asks: _answer(engine, asks, logprobs)


def _answer(engine: Any, asks: list[Ask], logprobs: bool) -> list[Answer]:
    sampling = [
        SamplingParams(
            temperature=1.0,
            max_tokens=ask.num_tokens,
            ignore_eos=True,
            detokenize=False,
            # 0: of the sampled token alone.
            logprobs=0 if logprobs else None,
        )
        for ask in asks
    ]
    prompts = [{"prompt_token_ids": ask.prompt_ids} for ask in asks]
    outputs = [result.outputs[0] for result in engine.generate(prompts, sampling, use_tqdm=False)]
    return [Answer(len(out.token_ids), len(out.logprobs or ())) for out in outputs]
