"""Run many requests on one replica until each has its final output."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import msgspec

from engine.errors import InvalidRequest, SlipstreamError
from engine.protocol import (
    Abort,
    IntArray,
    Pooling,
    ReplicaState,
    Request,
    RequestOutput,
    SamplingParams,
    Stop,
)
from rollout.replica.base import Replica
from rollout.requests.outputs import Gathered, refused
from rollout.scheduler.validate import check_request, limits_of
from rollout.text.detokenizer import Detokenizer
from rollout.text.tokenizer import Tokenizer

_MIN_WINDOW = 1024
_NOTHING_SAMPLED = SamplingParams(max_new_tokens=0)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a batch is. num_tokens: output tokens returned so far."""

    num_done: int
    num_requests: int
    num_tokens: int


OnProgress = Callable[[Progress], None]


def generate(
    replica: Replica,
    requests: Sequence[Request],
    *,
    tokenizer: Tokenizer | None = None,
    on_progress: OnProgress | None = None,
) -> list[RequestOutput]:
    """Final outputs of `requests`, whole and in their order.

    A request that is refused or fails comes back with finish type "abort" and the error in
    it; the others go on. Requests with stop strings need the tokenizer. `on_progress` is
    called after every step.

    Raises InvalidRequest if two requests share an id or the replica is paused, EngineDead
    if the replica dies.
    """
    seen: set[str] = set()
    for request in requests:
        if request.rid in seen:
            raise InvalidRequest(f"two requests have the id {request.rid!r}", field="rid")
        seen.add(request.rid)
    outputs = run(
        replica, requests, total=len(requests), tokenizer=tokenizer, on_progress=on_progress
    )
    by_rid = {output.rid: output for output in outputs}
    return [by_rid[request.rid] for request in requests]


def classify_request(rid: str, prompt_ids: IntArray, *, group: str = "") -> Request:
    """The request that has a classifier score `prompt_ids` (int32 [n]) at their last token.

    group: equal for sequences that begin alike; they are looked at together, so that what they
    share is computed once.
    """
    return Request(
        rid=rid,
        prompt_ids=prompt_ids,
        sampling=_NOTHING_SAMPLED,
        seed=0,
        group=group,
        task="classify",
    )


def classify(replica: Replica, prompts: Iterable[IntArray]) -> list[RequestOutput]:
    """The outputs of scoring each of `prompts` (int32 [n]), in their order; `scores` are float32
    [num_labels], raw.

    One that is refused (too long, or sent to a model that generates) or fails has finish type
    "abort" with the error, and no scores; the others go on. Raises as `generate` does.
    """
    call = uuid.uuid4().hex
    requests = [classify_request(f"{call}-{n}", ids) for n, ids in enumerate(prompts)]
    return generate(replica, requests)


def embed_request(
    rid: str, prompt_ids: IntArray, *, pooling: Pooling = "last", group: str = ""
) -> Request:
    """The request that has a model embed `prompt_ids` (int32 [n]). pooling: as in `Request`. group:
    as in `classify_request`."""
    return Request(
        rid=rid,
        prompt_ids=prompt_ids,
        sampling=_NOTHING_SAMPLED,
        seed=0,
        group=group,
        task="embed",
        pooling=pooling,
    )


def embed(
    replica: Replica, prompts: Iterable[IntArray], *, pooling: Pooling = "last"
) -> list[RequestOutput]:
    """The outputs of embedding each of `prompts` (int32 [n]), in their order; `embedding` is
    float32 [hidden_size], of whatever length the model gives it. Failures as in `classify`."""
    call = uuid.uuid4().hex
    requests = [embed_request(f"{call}-{n}", ids, pooling=pooling) for n, ids in enumerate(prompts)]
    return generate(replica, requests)


def run(
    replica: Replica,
    requests: Iterable[Request],
    *,
    total: int,
    tokenizer: Tokenizer | None = None,
    on_progress: OnProgress | None = None,
) -> Generator[RequestOutput, None, None]:
    """Final outputs as they come. `requests` is read as fast as the replica works, so it
    may be long; `total` is its length, for progress. Closing the iterator early aborts
    what still runs. Errors as in `generate`."""
    state = replica.state()
    if state.paused:
        raise InvalidRequest("the replica is paused; send Resume first", field="pause")
    batch = OpenRequests(replica, tokenizer, state)
    source = iter(requests)
    try:
        while batch.refill(source):
            yield from batch.step()
            if on_progress is not None:
                on_progress(batch.progress(total))
    finally:
        batch.abandon()


class OpenRequests:
    """Requests of one caller that are under way: some more than may run at once.

    The caller alone steps the replica meanwhile. tokenizer: looks for stop strings; without it
    requests that have any are refused.
    """

    def __init__(self, replica: Replica, tokenizer: Tokenizer | None, state: ReplicaState) -> None:
        self._replica = replica
        self._tokenizer = tokenizer
        self._limits = limits_of(state)
        self._window = max(_MIN_WINDOW, 4 * state.max_running)
        self._open: dict[str, Gathered] = {}
        self._finished: list[RequestOutput] = []
        self._num_done = 0
        self._num_tokens = 0
        self._in_replica = False

    def refill(self, source: Iterator[Request]) -> bool:
        """Submit what fits of `source`; whether anything is left to wait for. An iterator that has
        ended may have more at the next call."""
        room = self._window - len(self._open)
        accepted = [r for request in islice(source, room) if (r := self._open_one(request))]
        if accepted:
            self._in_replica = True
            self._replica.submit(accepted)
            self._in_replica = False
        return bool(self._open or self._finished)

    def step(self) -> list[RequestOutput]:
        """Advance the replica; the requests that finished."""
        self._in_replica = True
        outputs = self._replica.step()
        self._in_replica = False
        for output in outputs:
            self._take(output)
        finished, self._finished = self._finished, []
        self._num_done += len(finished)
        return finished

    def progress(self, total: int) -> Progress:
        """How far this batch is."""
        return Progress(num_done=self._num_done, num_requests=total, num_tokens=self._num_tokens)

    def drop(self, rids: Sequence[str]) -> None:
        """Abort some of the open requests, whose outputs nobody will read; they stay open until the
        replica has ended them. An id that is not open is no error."""
        found = [rid for rid in rids if rid in self._open]
        if found:
            self._replica.send(Abort(rids=found, message="the caller left"))

    def abandon(self) -> None:
        """Abort what is still open; nobody will read it. A replica that has raised is asked for
        nothing more: what it would say hides why it failed."""
        rids = list(self._open)
        self._open.clear()
        if rids and not self._in_replica:
            with suppress(SlipstreamError):
                self._replica.send(Abort(rids=rids, message="the caller left"))

    def _open_one(self, request: Request) -> Request | None:
        try:
            detokenizer = self._detokenizer(request)
        except InvalidRequest as error:
            self._finished.append(refused(request, error))
            return None
        if detokenizer is not None:
            request = msgspec.structs.replace(request, stream=True)
        gathered = Gathered(request, detokenizer)
        self._open[request.rid] = gathered
        return gathered.request

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        """What looks for the stop strings of a request, if it has any. Raises InvalidRequest."""
        if not request.sampling.stop:
            return None
        if self._tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer", field="stop")
        if request.output_ids is not None:
            # Their text is looked at before the engine has seen the request.
            check_request(request, self._limits)
        return Detokenizer(self._tokenizer, request.sampling, request.prompt_ids)

    def _take(self, output: RequestOutput) -> None:
        gathered = self._open.get(output.rid)
        if gathered is None:
            return
        self._num_tokens += len(output.token_ids)
        match = gathered.add(output)
        if output.finish is not None:
            del self._open[output.rid]
            self._finished.append(gathered.result())
        elif match is not None:
            self._replica.send(
                Stop(rid=output.rid, num_tokens=match.num_tokens, matched=match.matched)
            )
