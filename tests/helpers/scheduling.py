"""A scheduler on a mock executor, and what its requests must come out as."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Sequence_
from itertools import cycle

import numpy as np

from engine.config import SchedulerConfig, SpeculativeConfig
from engine.protocol import (
    Request,
    RequestOutput,
    SamplingParams,
    StepPlan,
    StepResult,
)
from rollout.cache.manager import CacheManager
from rollout.masks.base import KnownMask, bits_of
from rollout.masks.courses import Courses
from rollout.masks.places import MaskPlaces, framed_masks
from rollout.replica.columns import from_columns
from rollout.scheduler.emit import StepOutput
from rollout.scheduler.encode import row_numbers
from rollout.scheduler.scheduler import Scheduler
from rollout.scheduler.sequence import Sequence
from tests.helpers.mock_executor import (
    MockExecutor,
    entropy,
    generate_alone,
    logprob,
    prefix_hashes,
)
from tests.helpers.mock_routes import EXPERTS, expected_routes

VOCAB = 97


def make_request(
    rid: str, prompt: Iterable[int], *, max_new: int = 8, seed: int | None = None, **fields: object
) -> Request:
    """A request; keywords that `SamplingParams` has go there, the rest to `Request`."""
    names = set(SamplingParams.__struct_fields__)
    sampling = {name: value for name, value in fields.items() if name in names}
    rest = {name: value for name, value in fields.items() if name not in names}
    return Request(
        rid=rid,
        prompt_ids=np.array(list(prompt), np.int32),
        sampling=SamplingParams(max_new_tokens=max_new, **sampling),
        seed=sum(rid.encode()) if seed is None else seed,
        **rest,
    )


class Bench:
    """A scheduler, its executor, and every output so far by request id.

    overlap: plan a step before the result of the one before it is applied. num_labels: of a
    classifier. lateness: steps that each step with masked rows is late, over and over: whatever
    is called meanwhile comes between its plan and its masks.
    """

    def __init__(
        self,
        *,
        num_pages: int = 256,
        page_size: int = 4,
        prefix_cache: bool = True,
        context_length: int = 128,
        overlap: bool = False,
        num_labels: int = 0,
        speculative: SpeculativeConfig | None = None,
        lateness: Sequence_[int] = (0,),
        **config: object,
    ) -> None:
        self.cache = CacheManager(num_pages, page_size, prefix_cache=prefix_cache)
        settings = {"max_running": 16, "max_step_tokens": 64, "max_chunk_tokens": 32, **config}
        self.scheduler = Scheduler(
            SchedulerConfig(**settings),
            self.cache,
            context_length=context_length,
            vocab_size=VOCAB,
            num_labels=num_labels,
            experts=EXPERTS,
            keeps_routes=True,
            speculative=speculative,
        )
        self.executor = MockExecutor(
            num_pages=num_pages, page_size=page_size, vocab_size=VOCAB, num_labels=num_labels
        )
        self.plans: list[StepPlan] = []
        self.outputs: dict[str, list[RequestOutput]] = {}
        self._depth = 1 if overlap else 0
        self._results: deque[StepResult] = deque()
        self._lateness = cycle(lateness)
        self._waits: StepPlan | None = None
        self._late = 0

    def add(self, *requests: Request) -> None:
        """Queue requests."""
        for request in requests:
            answer = self.scheduler.add(request)
            self.keep([] if answer is None else [answer])

    def keep(self, outputs: Iterable[StepOutput]) -> list[RequestOutput]:
        """File outputs that came from a command or a step, each of columns by itself."""
        found = from_columns(outputs)
        for output in found:
            self.outputs.setdefault(output.rid, []).append(output)
        return found

    def step(self) -> StepPlan | None:
        """Plan, execute and apply one step, the last with a delay when overlapped. One that waits
        for masks and is late is returned again and again."""
        if self._waits is not None:
            return self._wait(self._waits)
        plan = self.scheduler.plan()
        if plan is not None:
            self.plans.append(plan)
        if plan is not None and plan.waits:
            # Its masks are of the tokens before it.
            while self._results:
                self.keep(self.scheduler.apply(self._results.popleft()))
            self._waits, self._late = plan, next(self._lateness)
            return self._wait(plan)
        if plan is not None:
            self._results.append(self.executor.step(plan))
        if len(self._results) > (self._depth if plan is not None else 0):
            self.keep(self.scheduler.apply(self._results.popleft()))
        self.scheduler.check_integrity()
        return plan

    def settle(self) -> None:
        """Let the step that waits for masks have them, as a leader does before most commands."""
        if self._waits is not None:
            self._late = 0
            self._wait(self._waits)

    def _wait(self, plan: StepPlan) -> StepPlan:
        self._late -= 1
        if self._late >= 0:
            return plan
        copies = [copy.running for copy in self.scheduler.copies]
        rows = Courses(len(copies), len(copies[0].table.phase)).rows(copies, plan).unknown
        bits = [bits_of(may_come(row.request, row.output_ids.tolist()), VOCAB) for row in rows]
        found = [KnownMask(own) for own in bits]
        places = [MaskPlaces(VOCAB, len(copy.table.phase)) for copy in copies]
        masks = framed_masks(places, plan, [row.row for row in rows], found)
        self._waits = None
        self._results.append(self.executor.step(plan, masks))
        if self._depth == 0:
            self.keep(self.scheduler.apply(self._results.popleft()))
        self.scheduler.check_integrity()
        return plan

    def run(self, limit: int = 5000) -> dict[str, RequestOutput]:
        """Step until nothing is left; the final output of each request, streams joined."""
        for _ in range(limit):
            if not self.scheduler.has_work() and not self._results and self._waits is None:
                break
            before = len(self._results)
            assert self.step() is not None or before, "work is left but nothing is planned"
        assert not self.scheduler.has_work(), "did not finish"
        self.check_empty()
        return {rid: joined(outputs) for rid, outputs in self.outputs.items()}

    def check_empty(self) -> None:
        """Nothing may be held once nothing runs: every page is free or cached."""
        self.scheduler.check_integrity()
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.free_pages + stats.cached_pages == stats.total_pages
        assert self.cache.num_available == stats.total_pages, "a lock leaked"

    def set_version(self, version: int) -> list[RequestOutput]:
        """New weights, on both sides; the outputs of requests that this ended. Where drafts are
        verified no step may be in flight, as none is when a leader commits."""
        self.settle()
        self.land()
        self.executor.version = version
        return self.keep(self.scheduler.set_version(version))

    def land(self) -> None:
        """Take in the steps in flight where drafts are verified."""
        while self.scheduler.copies[0].drafts and self._results:
            self.keep(self.scheduler.apply(self._results.popleft()))

    def check_routes(self, request: Request, output: RequestOutput, *, whole: bool = True) -> None:
        """The routes of a final output are those of the steps that sampled its tokens, if it asked
        for them; of one that is not whole, those that nobody computed are absent."""
        routes, start = output.routed_experts, output.routed_experts_start
        if not request.return_routed_experts:
            assert routes is None
            return
        size = output.start + len(output.token_ids)
        hashes = prefix_hashes([*request.prompt_ids.tolist(), *expected(request)[0][:size]])[:-1]
        assert routes is not None and start == request.routed_experts_start_len
        assert routes.dtype == np.uint8 and len(routes) == max(len(hashes) - start, 0)
        versions = self.executor.first_read.get(request.seed, [])[: len(hashes)]
        computed = expected_routes(hashes[start : len(versions)], versions[start:])
        known = (routes[:, EXPERTS.layers] != 255).all(axis=(1, 2))
        count = int(known.sum())
        assert known[:count].all() and count <= len(computed), f"{request.rid}: a gap"
        assert (routes[:count] == computed[:count]).all(), f"{request.rid}: other routes"
        assert (routes[count:, EXPERTS.layers] == 255).all()
        if whole:
            assert known.all(), f"{request.rid}: no routes from {count} on"

    def check_kv_spans(self, request: Request, output: RequestOutput) -> None:
        """The KV spans of a final output say what the executor found in the KV."""
        said = [span.version for span in output.kv_spans for _ in range(span.start, span.end)]
        position = 0
        for span in output.kv_spans:
            assert span.start == position < span.end
            position = span.end
        assert said == self.executor.kv_versions.get(request.seed, [])[:position]
        if request.kv_policy != "keep":
            assert len(output.kv_spans) <= 1, f"{request.rid}: KV of two versions"
        if request.kv_policy == "fresh":
            versions = {span.version for span in (*output.spans, *output.kv_spans)}
            assert len(versions) <= 1, f"{request.rid}: sampled by versions {versions}"


def joined(outputs: list[RequestOutput]) -> RequestOutput:
    """The pieces of a stream as one output; checks that they fit together."""
    size = outputs[0].start
    for output in outputs:
        assert output.start == size, f"{output.rid}: piece starts at {output.start}, not {size}"
        size += len(output.token_ids)
    assert outputs[-1].finish is not None
    assert all(output.finish is None for output in outputs[:-1])
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    return RequestOutput(
        rid=outputs[0].rid,
        start=outputs[0].start,
        token_ids=np.concatenate([output.token_ids for output in outputs]),
        logprobs=np.concatenate([output.logprobs for output in outputs]),
        finish=outputs[-1].finish,
        prompt_tokens=outputs[0].prompt_tokens,
        cached_tokens=outputs[0].cached_tokens,
        num_retractions=outputs[-1].num_retractions,
        num_restarts=outputs[-1].num_restarts,
        kv_spans=outputs[-1].kv_spans,
        spans=[span for output in outputs for span in output.spans],
        prompt_logprobs=outputs[0].prompt_logprobs,
        prompt_top=outputs[0].prompt_top,
        top=outputs[-1].top if len(outputs) == 1 else None,
        entropies=_joined_entropies(outputs),
        scores=outputs[-1].scores,
        embedding=outputs[-1].embedding,
        spec=outputs[-1].spec,
        routed_experts=outputs[-1].routed_experts,
        routed_experts_start=outputs[-1].routed_experts_start,
    )


def _joined_entropies(outputs: list[RequestOutput]) -> np.ndarray | None:
    parts = [output.entropies for output in outputs if output.entropies is not None]
    assert len(parts) in (0, len(outputs)), "some pieces have entropies, others have not"
    return np.concatenate(parts) if parts else None


def expected(request: Request) -> tuple[list[int], list[float]]:
    """Tokens and logprobs of `request` were it alone."""
    size = request.sampling.max_new_tokens
    tokens = request.prompt_ids
    sequence = Sequence(
        request=request,
        arrival=0,
        group_order=0,
        numbers=row_numbers(request, size),
        tokens=tokens,
    )
    return generate_alone(
        tokens.tolist(),
        sequence.row_sampling(),
        request.stop_ids,
        size,
        VOCAB,
        lambda outputs: may_come(request, outputs) if request.masked else None,
    )


def may_come(request: Request, outputs: list[int]) -> list[int]:
    """The mask of a request after some output tokens, which all of them decide: about half of its
    `allowed_token_ids`, or all of them."""
    allowed: list[int] = request.allowed_token_ids.tolist()
    turn = sum((at + 1) * token for at, token in enumerate(outputs)) % 2
    return [token for token in allowed if token % 2 == turn] or allowed


def expected_prompt_logprobs(request: Request) -> list[float]:
    """Logprobs of positions [max(prompt_logprob_start, 1), prompt_len)."""
    tokens = request.prompt_ids.tolist()
    hashes = prefix_hashes(tokens)
    start = max(request.prompt_logprob_start, 1)
    return [logprob(hashes[p - 1], tokens[p]) for p in range(start, len(tokens))]


def expected_entropies(request: Request, token_ids: list[int]) -> list[float]:
    """Entropies of the distributions that `token_ids` were drawn from."""
    hashes = prefix_hashes([*request.prompt_ids.tolist(), *token_ids])
    start = len(request.prompt_ids) - 1
    return [entropy(before) for before in hashes[start : start + len(token_ids)]]


def check_entropies(request: Request, output: RequestOutput) -> None:
    """Those of the tokens returned if the request wants them, else none."""
    assert (output.entropies is not None) == request.entropy
    if output.entropies is not None:
        assert output.entropies.dtype == np.float32
        tokens = expected(request)[0][: output.start] + output.token_ids.tolist()
        entropies = expected_entropies(request, tokens)
        assert output.entropies.tolist() == entropies[output.start :], request.rid


def check_output(request: Request, output: RequestOutput) -> None:
    """`output` is that of a request which ran to its own end, from where it went on."""
    tokens, logprobs = expected(request)
    assert output.token_ids.tolist() == tokens[output.start :], request.rid
    assert output.logprobs.tolist() == logprobs[output.start :], request.rid
    check_entropies(request, output)
    assert output.finish is not None and output.finish.type in ("stop", "length")
    check_spans(output)
    if request.prompt_logprob_start >= 0:
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs.tolist() == expected_prompt_logprobs(request)


def check_spans(output: RequestOutput) -> None:
    """Spans cover the output tokens without gap or overlap, versions rising."""
    position, version = output.start, -1
    for span in output.spans:
        assert span.start == position and span.end > span.start
        assert span.version >= version
        position, version = span.end, span.version
    assert position == output.start + len(output.token_ids)
