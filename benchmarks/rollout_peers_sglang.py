"""SGLang as a peer of `benchmarks/rollout_peers.py`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sglang
from rollout_peers_calls import Answer, Ask, Run

MEMORY_SHARE = 0.85


@contextmanager
def opened(
    config: Path, *, longest: int, max_rows: int, logprobs: bool, timeout_s: float
) -> Iterator[Run]:
    """An offline engine with dummy weights. Its deadline is that of the process it runs in."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config, Path(folder) / "config.json")
        engine = sglang.Engine(
            model_path=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            context_length=longest + 16,
            max_running_requests=max_rows,
            cuda_graph_max_bs=max_rows,
            mem_fraction_static=MEMORY_SHARE,
        )
        try:
            yield lambda asks: _answer(engine, asks, logprobs)
        finally:
            engine.shutdown()


def _answer(engine: Any, asks: list[Ask], logprobs: bool) -> list[Answer]:
    results = engine.generate(
        input_ids=[ask.prompt_ids for ask in asks],
        sampling_params=[
            {"temperature": 1.0, "max_new_tokens": ask.num_tokens, "ignore_eos": True}
            for ask in asks
        ],
        return_logprob=logprobs,
    )
    return [
        Answer(
            result["meta_info"]["completion_tokens"],
            len(result["meta_info"].get("output_token_logprobs", ())),
        )
        for result in results
    ]
