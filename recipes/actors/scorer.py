"""An engine that only scores: log-probabilities of given sequences under a model that never learns.

It runs in a process of its own, which the main process speaks with: a teacher's, or a reference's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import numpy as np

from engine.config import CacheConfig, EngineConfig, LoadFormat, ParallelConfig
from engine.errors import EngineDead, SlipstreamError
from engine.protocol import (
    FloatArray,
    FlushCache,
    ReplicaState,
    Request,
    RequestOutput,
    SamplingParams,
)
from recipes.actors.actor import raise_if_failed
from recipes.actors.fleet_engine import FleetEngine, Launch
from recipes.settings.options import RunOptions
from recipes.types import Trajectory
from recipes.world import World
from rollout.launch import launch as launch_replica

logger = logging.getLogger(__name__)

T = TypeVar("T")


def scoring_config(
    options: RunOptions,
    model: str,
    *,
    kv_memory_gb: float,
    load_format: LoadFormat = "auto",
    gpu: int = 0,
) -> EngineConfig:
    """The configuration of an engine that scores beside the run of `options`.

    model, load_format: where its weights come from. kv_memory_gb: GiB of its KV cache, beside what
    the run's own engine has. gpu: the one it is on, where the run has GPUs.
    """
    return EngineConfig(
        model=model,
        load_format=load_format,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        cache=CacheConfig(memory_bytes=int(kv_memory_gb * 2**30)),
        parallel=ParallelConfig(base_gpu=gpu),
    )


class ScoringEngine:
    """Scores sequences with one replica, which is started again when it dies.

    Every call is made by all processes of the run, with equal arguments; the main one speaks with
    the replica and gives the others what it said, errors included.
    """

    def __init__(
        self,
        config: EngineConfig,
        world: World | None = None,
        *,
        option: str,
        temperature: float,
        launch: Launch | None = None,
    ) -> None:
        """Collective: start the replica.

        option: which one of the run asks for it, e.g. "teacher": errors name it. temperature: of
        the rollouts; logprobs are of softmax(logits / temperature). launch: starts the replica,
        by default in a process of its own. Raises ModelError, OutOfMemory or EngineDead.
        """
        self._world = world or World()
        self._option = option
        self._temperature = temperature
        self._launch = launch or partial(launch_replica, config, process=True)
        self._engine: FleetEngine | None = None
        self.state: ReplicaState = self._on_main(self._start)

    def logprobs(self, trajectories: Sequence[Trajectory]) -> tuple[FloatArray, ...]:
        """Collective: float32 [response_len] a trajectory, the log-probability of each of its
        response tokens.

        A replica that dies is started again once; raises EngineDead if that dies too, and the
        error of a sequence that it cannot score, such as ContextTooLong.
        """
        return self._on_main(lambda: self._score(trajectories))

    def close(self) -> None:
        """Free the replica. Idempotent."""
        if self._engine is not None:
            self._engine.close()

    def _on_main(self, act: Callable[[], T]) -> T:
        """What `act` returns in the main process, in every process; or its error, raised."""
        result: T | None = None
        failure: SlipstreamError | None = None
        if self._world.is_main:
            try:
                result = act()
            except SlipstreamError as error:
                failure = type(error)(f"{self._option}: {error.message}", field=self._option)
                failure.__cause__ = error
        result, failure = self._world.from_main((result, failure))
        if failure is not None:
            raise failure
        assert result is not None
        return result

    def _start(self) -> ReplicaState:
        self._engine = FleetEngine(0, self._launch(), self._launch)
        return self._engine.state()

    def _score(self, trajectories: Sequence[Trajectory]) -> tuple[FloatArray, ...]:
        assert self._engine is not None
        requests = self._requests(trajectories)
        done: dict[str, RequestOutput] = {}
        lost = self._engine.generate(requests, done)
        if lost is not None:
            logger.warning("%s: the engine is lost: %s", self._option, lost)
            self._engine.revive()
            lost = self._engine.generate([r for r in requests if r.rid not in done], done)
        if lost is not None:
            raise EngineDead(
                f"the engine died again where it was started again: {lost.message}",
                field=self._option,
            )
        with suppress(EngineDead):
            # What later calls return does not depend on earlier ones: nor does a resumed run.
            self._engine.send(FlushCache())
        return tuple(_logprobs(done[request.rid]) for request in requests)

    def _requests(self, trajectories: Sequence[Trajectory]) -> list[Request]:
        """One a trajectory. A sequence may fill the context, where a prompt leaves room for a
        token: the last token of the response is not in the prompt, but named, as one whose
        logprob is wanted behind it."""
        requests = []
        for index, trajectory in enumerate(trajectories):
            prompt_len, response_len = len(trajectory.prompt_ids), len(trajectory.response_ids)
            ids = np.concatenate([trajectory.prompt_ids, trajectory.response_ids])
            requests.append(
                Request(
                    rid=f"score-{index}",
                    prompt_ids=ids[:-1].astype(np.int32),
                    sampling=SamplingParams(max_new_tokens=1, temperature=self._temperature),
                    seed=0,
                    prompt_logprob_start=prompt_len if response_len > 1 else -1,
                    logprob_ids=[int(ids[-1])],
                )
            )
        return requests


def _logprobs(output: RequestOutput) -> FloatArray:
    """float32 [response_len] from what came of a request. Raises the error of a refused one."""
    raise_if_failed(output)
    assert output.top is not None
    last = output.top.logprobs[0, -1:]
    before = output.prompt_logprobs
    return last.copy() if before is None else np.concatenate([before, last])
