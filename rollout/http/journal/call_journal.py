"""The journal of one call: what its sequences got before, and what they get now.

A call that goes on runs as any other: its body is read, its prompts become tokens, its sequences
are made. Then they take the outputs of the records as if the engine had just brought them, and the
engine gets them with their tokens (`Request.output_ids`), as sequences that were retracted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import msgspec
import numpy as np

from engine.errors import EngineDead, InvalidRequest, SlipstreamError
from engine.protocol import Request, RequestOutput
from rollout.http.engine.client import AsyncEngine
from rollout.http.journal.pace import Pace
from rollout.http.journal.records import decoded, encoded
from rollout.http.native.sample import Sample
from rollout.scheduler.continued import ended_with, num_given

_EVERY_S = 0.025
_EVERY_TOKENS = 4
"""Of a reply that is no stream, at most, and as many as come in `_EVERY_S`: what the engine keeps
back between two outputs is drawn again if its worker is lost."""


class WorkerBehind(SlipstreamError):
    """This server has older weights than those that sampled the last token: ask another one."""

    status = 503


class VersionGone(SlipstreamError):
    """A request whose `kv_policy` is fresh has tokens, which its client has, of weights that this
    server no longer has. Send it again."""

    status = 409


class CallJournal:
    """records: what was sampled before, in order. num_pieces: of the reply, that the client has.
    pace: of the server's sequences. write: takes a record and the version of its last token, or
    None without one; flush: sends what was taken."""

    def __init__(
        self,
        engine: AsyncEngine,
        records: Sequence[bytes],
        *,
        num_pieces: int,
        pace: Pace,
        write: Callable[[bytes, int | None], None],
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._records = list(records)
        self._num_pieces = num_pieces
        self._pace = pace
        self._came_at: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._write = write
        self._flush = flush
        self._flushed_at = time.monotonic()
        self._samples: list[Sample] = []
        self._places: dict[str, int] = {}
        self._replayed: list[list[RequestOutput]] = []
        self._told: dict[str, list[RequestOutput]] = {}
        self.lost: EngineDead | None = None

    def sampling(self, samples: Sequence[Sample]) -> None:
        """The sequences of the call, before they are sent to the engine, which is told to bring
        tokens as they come. Raises WorkerBehind, VersionGone, InvalidRequest."""
        self._samples = list(samples)
        rids = [sample.request.rid for sample in samples]
        self._places = {rid: place for place, rid in enumerate(rids)}
        self._replayed = [decoded(record, rids) for record in self._records]
        counts = {s.request.rid: num_given(s.request) for s in samples}
        for output in (output for outputs in self._replayed for output in outputs):
            if output.start != counts[output.rid]:
                raise InvalidRequest(
                    f"a record begins at token {output.start}, and those before it end at "
                    f"{counts[output.rid]}",
                    field="journal",
                )
            counts[output.rid] += len(output.token_ids)
            self._told.setdefault(output.rid, []).append(output)
        self._check_version()
        every = self._pace.tokens_within(_EVERY_S, _EVERY_TOKENS)
        for sample in samples:
            if _may_come_early(sample.request):
                sample.request = msgspec.structs.replace(
                    sample.request, stream=True, stream_every=every
                )

    def replayed(self) -> Iterator[list[RequestOutput]]:
        """The outputs of the records, as they came together."""
        yield from self._replayed

    def to_send(self, sample: Sample) -> Request:
        """What the engine gets of a sequence, which has taken what was replayed: its tokens too."""
        request, told = sample.request, self._told.get(sample.request.rid)
        if told is None:
            return request
        before = [] if request.output_ids is None else [request.output_ids]
        ids = np.concatenate([*before, *(output.token_ids for output in told)]).astype(np.int32)
        # The scores of the prompt came with the first output.
        request = msgspec.structs.replace(request, output_ids=ids, prompt_logprob_start=-1)
        if sample.stop is not None:
            request = ended_with(request, sample.stop.num_tokens)
        return request

    async def record(self, outputs: Sequence[RequestOutput]) -> None:
        """Note outputs that came together, before anything is made of them. Raises EngineDead for
        those that say only that this server leaves."""
        leaving = self._engine.leaving
        if leaving is not None and any(_aborted(output) for output in outputs):
            raise leaving.copy()
        self._write(encoded([(self._places[o.rid], o) for o in outputs]), _version(outputs))
        now = time.monotonic()
        self._measure(outputs, now)
        if now - self._flushed_at > _EVERY_S:
            self._flushed_at = now
            await self._flush()
        elif self._timer is None:
            # What follows may be long in coming, and this worker may be lost before.
            wait_s = self._flushed_at + _EVERY_S - now
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._flush_late)

    def close(self) -> None:
        """The reply has ended: nothing is left to be flushed later."""
        if self._timer is not None:
            self._timer.cancel()
        if self._flushing is not None:
            self._flushing.cancel()

    def _flush_late(self) -> None:
        self._timer, self._flushed_at = None, time.monotonic()
        self._flushing = asyncio.get_running_loop().create_task(self._flush_now())

    async def _flush_now(self) -> None:
        await self._flush()

    def _measure(self, outputs: Sequence[RequestOutput], now: float) -> None:
        for output in outputs:
            before = self._came_at.get(output.rid)
            if before is not None and len(output.token_ids):
                self._pace.note(len(output.token_ids), now - before)
            self._came_at[output.rid] = now

    def _check_version(self) -> None:
        version = _version([output for outputs in self._replayed for output in outputs])
        if version is None:
            return
        if self._engine.version < version:
            raise WorkerBehind(
                f"the last token is of version {version}, and this server has "
                f"{self._engine.version}",
                field="version",
            )
        fresh = any(sample.request.kv_policy == "fresh" for sample in self._samples)
        if not fresh or self._engine.version == version:
            return
        if self._num_pieces:
            raise VersionGone(
                f"kv_policy is fresh, and the tokens that came are of version {version}; send the "
                "request again",
                field="kv_policy",
            )
        self._replayed, self._told = [], {}


def _may_come_early(request: Request) -> bool:
    """Whether the engine may return tokens before the end, of a sequence that no one streams."""
    early = request.stream or request.kv_policy == "fresh" or bool(request.session)
    return not early and request.task == "generate"


def _aborted(output: RequestOutput) -> bool:
    return output.finish is not None and output.finish.type == "abort"


def _version(outputs: Sequence[RequestOutput]) -> int | None:
    """Of the weights that sampled the last token; None without one."""
    for output in reversed(outputs):
        if output.spans:
            return output.spans[-1].version
    return None
