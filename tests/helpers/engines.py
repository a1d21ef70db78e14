"""Small real engines, and the requests that tests send them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engine.config import (
    CacheConfig,
    EngineConfig,
    KVDType,
    ParallelConfig,
    SchedulerConfig,
)
from engine.protocol import Request, RequestOutput, SamplingParams
from rollout.launch import launch
from rollout.replica.inline import InlineReplica


def make_replica(
    model: str | Path,
    *,
    num_pages: int = 400,
    page_size: int = 8,
    prefix_cache: bool = True,
    max_running: int = 64,
    max_step_tokens: int = 512,
    max_chunk_tokens: int = 128,
    context_length: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    cuda_graphs: bool = True,
    overlap: bool | None = None,
    kv_dtype: KVDType = "auto",
    dp_size: int = 1,
) -> InlineReplica:
    """An inline replica over the checkpoint at `model`."""
    replica = launch(
        EngineConfig(
            model=str(model),
            dtype=dtype,
            device=device,
            context_length=context_length,
            cuda_graphs=cuda_graphs,
            parallel=ParallelConfig(dp_size=dp_size),
            cache=CacheConfig(
                num_pages=num_pages,
                page_size=page_size,
                prefix_cache=prefix_cache,
                kv_dtype=kv_dtype,
            ),
            scheduler=SchedulerConfig(
                max_running=max_running,
                max_step_tokens=max_step_tokens,
                max_chunk_tokens=max_chunk_tokens,
                overlap=overlap,
                check_integrity=True,
            ),
        )
    )
    assert isinstance(replica, InlineReplica)
    return replica


def request(
    rid: str, ids: Sequence[int], *, seed: int = 0, group: str = "", stop_ids=(), **sampling
) -> Request:
    """A request for token ids with sampling parameters by name."""
    return Request(
        rid=rid,
        prompt_ids=np.array(ids, dtype=np.int32),
        sampling=SamplingParams(**{"max_new_tokens": 16, **sampling}),
        seed=seed,
        group=group,
        stop_ids=list(stop_ids),
    )


def drain(replica, limit: int = 10_000) -> dict[str, RequestOutput]:
    """Step until idle; final outputs by id."""
    finals: dict[str, RequestOutput] = {}
    for _ in range(limit):
        for output in replica.step():
            if output.finish is not None:
                finals[output.rid] = output
        if replica.idle():
            return finals
    raise AssertionError("the replica did not become idle")


@torch.no_grad()
def exact_logprobs(model, prompt: Sequence[int], output: Sequence[int], temperature: float = 1.0):
    """Logprob of every output token by a plain transformers forward, float32 [len(output)]."""
    ids = torch.tensor([[*prompt, *output]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    chosen = torch.tensor(list(output)).unsqueeze(1)
    return logits.log_softmax(-1).gather(1, chosen).squeeze(1).numpy()
