"""An engine made of transformers: slow, simple, and right by construction."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.protocol import FinishReason, ReplicaState, Request, RequestOutput, VersionSpan
from rollout.requests.seeds import derive_seed
from trainer_bridge import PushReport


class FakeActor:
    """A `recipes.actors.actor.Actor`: samples token by token with a copy of the model.

    noise: added to every returned logprob, as an engine with other kernels would.
    """

    def __init__(self, model: Any, eos_ids: Sequence[int], noise: float = 0.0) -> None:
        self.model = copy.deepcopy(model).eval()
        self.eos_ids = list(eos_ids)
        self.noise = noise
        self.version = 0
        self.num_requests = 0
        self.num_flushes = 0
        self.closed = False

    def watch(self, watcher: Any) -> None:
        self.watcher = watcher

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        self.num_requests += len(requests)
        return [self._generate(request) for request in requests]

    def sleep(self) -> None:
        pass

    def push(self, model: torch.nn.Module, version: int, *, measure_memcpy: bool) -> PushReport:
        assert version > self.version
        self.model.load_state_dict(model.state_dict())
        self.version = version
        memcpy = 1e-3 if measure_memcpy else None
        return PushReport(
            version=version, num_tensors=1, num_bytes=4, seconds=2e-3, memcpy_seconds=memcpy
        )

    def flush(self) -> None:
        self.num_flushes += 1

    def state(self) -> ReplicaState:
        return ReplicaState(
            version=self.version,
            paused=False,
            num_running=0,
            num_waiting=0,
            free_pages=1,
            cached_pages=0,
            total_pages=1,
            page_size=16,
            context_length=64,
            vocab_size=self.model.config.vocab_size,
            eos_ids=self.eos_ids,
            model="fake",
            dtype="float32",
            device="cpu",
            attention="none",
            max_running=1,
        )

    def close(self) -> None:
        self.closed = True

    @torch.no_grad()
    def _generate(self, request: Request) -> RequestOutput:
        ids = request.prompt_ids.tolist()
        tokens: list[int] = []
        logprobs: list[float] = []
        finish = FinishReason(type="length", length=request.sampling.max_new_tokens)
        for position in range(request.sampling.max_new_tokens):
            logits = self.model(torch.tensor([ids + tokens])).logits[0, -1]
            token, logprob = _draw(logits, request, position)
            tokens.append(token)
            logprobs.append(logprob + self.noise)
            if token in request.stop_ids:
                finish = FinishReason(type="stop", matched=token)
                break
        return RequestOutput(
            rid=request.rid,
            start=0,
            token_ids=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            finish=finish,
            prompt_tokens=len(ids),
            spans=[VersionSpan(self.version, 0, len(tokens))],
        )


def _draw(logits: torch.Tensor, request: Request, position: int) -> tuple[int, float]:
    temperature = request.sampling.temperature
    if temperature < 1e-6:
        return int(logits.argmax()), float(logits.log_softmax(-1).max())
    logprobs = (logits / temperature).log_softmax(-1)
    generator = torch.Generator().manual_seed(derive_seed(request.seed, position))
    token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
    return token, float(logprobs[token])
