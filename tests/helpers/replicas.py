"""Replicas over the fake executor, and requests for them."""

from __future__ import annotations

import numpy as np

from engine.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from engine.protocol import Request, SamplingParams
from rollout.replica.inline import InlineReplica
from rollout.replica.spawned import ProcessReplica
from tests.helpers.fake_executor import EOS_ID, FakeExecutor

FACTORY = "tests.helpers.fake_executor:build"


def fake_config(
    model: str = "fake",
    *,
    max_waiting: int = 2000,
    num_pages: int = 256,
    overlap: bool | None = None,
    parallel: ParallelConfig | None = None,
    routes: bool = False,
) -> EngineConfig:
    """A small replica of the fake model. routes: keeps those of the model "experts"."""
    return EngineConfig(
        model=model,
        return_routed_experts=routes,
        cache=CacheConfig(page_size=4, num_pages=num_pages),
        scheduler=SchedulerConfig(
            max_running=32,
            max_step_tokens=64,
            max_waiting=max_waiting,
            overlap=overlap,
            check_integrity=True,
        ),
        parallel=parallel or ParallelConfig(),
    )


def inline(model: str = "fake", **options: int) -> InlineReplica:
    """The fake engine in this process."""
    config = fake_config(model, **options)
    return InlineReplica(config, FakeExecutor(config))


def overlapped(model: str = "fake", **options: int) -> InlineReplica:
    """The fake engine in this process, planning a step while the one before runs."""
    return inline(model, overlap=True, **options)


def spawned(model: str = "fake", *, reply_s: float = 60.0, **options: int) -> ProcessReplica:
    """The fake engine in its own process."""
    config = fake_config(model, **options)
    return ProcessReplica(config, factory=FACTORY, start_s=60.0, reply_s=reply_s)


def make_request(rid: str, prompt: list[int], **sampling: object) -> Request:
    """A request for ids; sampling fields by name."""
    sampling.setdefault("max_new_tokens", 8)
    params = SamplingParams(**sampling)
    ids = np.array(prompt, np.int32)
    return Request(rid=rid, prompt_ids=ids, sampling=params, seed=1, stop_ids=[EOS_ID])
