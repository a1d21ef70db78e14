"""Engines for prompt programs: one whose tokens depend on seeds, and replies by a script."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Self

from engine.protocol import GenerateRequest, GenerateResponse
from rollout.replica.inline import InlineReplica
from tests.helpers.fake_executor import NUM_PRINTABLE, FakeExecutor, next_token
from tests.helpers.replicas import fake_config
from tests.helpers.tiny_tokenizer import IM_END_ID, tiny_tokenizer


class SeededExecutor(FakeExecutor):
    """The fake engine, with the seed of a row added to every token."""

    def _next(self, slot: int, allowed: Sequence[int]) -> int:
        shift = self._shift + self._sampling[slot].seed % NUM_PRINTABLE
        return next_token(self._rows[slot], shift, allowed)


def seeded_replica() -> InlineReplica:
    """A replica of it in this process."""
    config = fake_config()
    return InlineReplica(config, SeededExecutor(config))


class ScriptedBackend:
    """Replies with texts in turn, each ended by the chat template's stop token; a `Backend` and its
    session. requests: what was asked."""

    def __init__(self, *texts: str) -> None:
        self.tokenizer = tiny_tokenizer()
        self.requests: list[GenerateRequest] = []
        self._texts = list(texts)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Self]:
        yield self

    async def generate(self, wire: GenerateRequest) -> GenerateResponse:
        self.requests.append(wire)
        text = self._texts.pop(0)
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), IM_END_ID]
        meta = {
            "finish_reason": {"type": "stop", "matched": IM_END_ID},
            "output_token_logprobs": [[-1.0, token_id, None] for token_id in ids],
            "prompt_tokens": len(wire.input_ids or ()),
            "cached_tokens": 0,
            "weight_versions": [],
        }
        return GenerateResponse(text=text, output_ids=ids, meta_info=meta)
