"""Whatever happens to a request on its way, its tokens are those of a request alone.

A state machine adds, aborts, stops, pauses, updates and steps in any order, on pools small
enough to run out. The mock executor asserts that every row reads its own KV.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from engine.config import SpeculativeConfig
from engine.errors import InvalidRequest, SlipstreamError
from engine.protocol import Request, RequestOutput
from tests.helpers.copied_bench import CopiedBench
from tests.helpers.mock_executor import mix
from tests.helpers.scheduling import (
    Bench,
    check_entropies,
    check_spans,
    expected,
    expected_prompt_logprobs,
    joined,
    make_request,
)

pytestmark = pytest.mark.slow

CONTEXT = 40
FEW_SHOT = [0, 1, 1, 0, 2, 2, 0, 1, 0, 0, 1, 2, 1, 1, 2, 0, 2, 1, 0, 1, 2, 2]
PROMPTS = st.builds(
    lambda size, tail: FEW_SHOT[:size] + tail,
    st.integers(0, len(FEW_SHOT)),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
)
FIELDS = st.fixed_dictionaries(
    {"max_new": st.integers(1, 14)},
    optional={
        "stop_ids": st.just(list(range(0, 97, 9))),
        "min_new_tokens": st.integers(0, 1),
        "priority": st.integers(-1, 1),
        "prompt_logprob_start": st.integers(0, 0),
        "top_logprobs": st.integers(1, 2),
        "stream": st.booleans(),
        "entropy": st.booleans(),
        "salt": st.sampled_from(["", "s"]),
        "kv_policy": st.sampled_from(["keep", "recompute", "fresh"]),
        "hold_at": st.integers(1, 14),
        "draft_tokens": st.integers(0, 7),
        "return_routed_experts": st.booleans(),
        "routed_experts_start_len": st.integers(0, 4),
        # Of both kinds that a mask may ask for, some are no stop ids.
        "allowed_token_ids": st.just(np.array([1, 2, 4, 5, 9, 18, 40, 71, 90], np.int32)),
    },
)
DRAFTS = st.just({"method": "off"}) | st.fixed_dictionaries(
    {
        "method": st.sampled_from(["ngram", "ngram", "auto"]),
        "draft_tokens": st.integers(1, 7),
        "history_tokens": st.sampled_from([4, 40, 1000]),
        "num_segments": st.sampled_from([1, 3, 100]),
        "num_sources": st.integers(1, 4),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Commands in any order; `requests` are all ever added, `ended_early` those cut off."""

    build: Callable[..., Bench] = Bench

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self.ended_early: set[str] = set()
        self.version = 0

    @initialize(
        num_pages=st.integers(5, 40),
        page_size=st.integers(1, 5),
        prefix_cache=st.booleans(),
        overlap=st.booleans(),
        max_running=st.integers(1, 8),
        max_step_tokens=st.integers(1, 40),
        max_chunk_tokens=st.integers(1, 16),
        policy=st.sampled_from(["fcfs", "longest_prefix"]),
        starvation_steps=st.integers(1, 4),
        drafts=DRAFTS,
        accepted=st.integers(0, 3),
        lateness=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    )
    def start(self, drafts: dict[str, Any], accepted: int, **config: object) -> None:
        """accepted: in three, drafts that come true."""
        speculative = SpeculativeConfig(pace="counts", **drafts)
        self.draft_tokens = drafts.get("draft_tokens", 0)
        self.bench = self.build(context_length=CONTEXT, speculative=speculative, **config)
        self.bench.executor.accepts = lambda seed, place: mix(seed, place, 11) % 3 < accepted

    @rule(
        prompt=PROMPTS,
        samples=st.integers(1, 4),
        fields=FIELDS,
        given=st.integers(0, 14) | st.just(0),
    )
    def add(self, prompt: list[int], samples: int, fields: dict[str, object], given: int) -> None:
        """given: output tokens that the requests come with, those that they would sample."""
        group = f"g{len(self.requests)}" if samples > 1 else ""
        if "draft_tokens" in fields:
            fields = {**fields, "draft_tokens": min(fields["draft_tokens"], self.draft_tokens)}
        for _ in range(samples):
            rid = f"r{len(self.requests)}."
            seed = len(self.requests)
            request = make_request(rid, prompt, group=group, seed=seed, **fields)
            if given:
                known = np.array(expected(request)[0][:given], np.int32)
                request = msgspec.structs.replace(request, output_ids=known)
            with suppress(InvalidRequest):
                self.bench.add(request)
                self.requests[rid] = request

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.bench.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted(self.requests)))
        self._cut(lambda: self.bench.scheduler.abort(rid))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), num_tokens=st.integers(0, 10))
    def stop(self, data: st.DataObject, num_tokens: int) -> None:
        rid = data.draw(st.sampled_from(sorted(self.requests)))
        if self.requests[rid].stream:
            return
        self._cut(lambda: self.bench.scheduler.stop(rid, num_tokens, "END"))

    @rule(mode=st.sampled_from(["keep", "keep", "retract", "abort"]))
    def pause(self, mode: str) -> None:
        self.bench.settle()
        self._cut(lambda: self.bench.scheduler.pause(mode))

    @rule()
    def resume(self) -> None:
        self.bench.scheduler.resume()

    @rule()
    def update(self) -> None:
        self.version += 1
        self._cut(lambda: self.bench.set_version(self.version), kept=True)

    @rule()
    def flush(self) -> None:
        self.bench.settle()
        with suppress(SlipstreamError):
            self.bench.scheduler.flush_cache()

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "bench"):
            self.bench.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.scheduler.resume()
        outputs = self.bench.run()
        assert set(outputs) == set(self.requests)
        for rid, request in self.requests.items():
            self._check(request, joined(self.bench.outputs[rid]))

    def _cut(self, command: Callable[[], list[RequestOutput]], *, kept: bool = False) -> None:
        """Run a command, which ends the requests whose outputs it returns (kept: which are filed
        already), and those whose outputs wait for routes from then on."""
        if kept:
            self.bench.settle()
            self.bench.land()
        waited = self._waiting()
        outputs = command()
        if not kept:
            self.bench.keep(outputs)
        self.ended_early.update(output.rid for output in outputs)
        self.ended_early |= self._waiting() - waited

    def _waiting(self) -> set[str]:
        reads = [copy.running.routes for copy in self.bench.scheduler.copies]
        return {rid for rid in self.requests if any(own.waits(rid) for own in reads)}

    def _check(self, request: Request, output: RequestOutput) -> None:
        tokens, logprobs = expected(request)
        size, start = len(output.token_ids), output.start
        assert output.token_ids.tolist() == tokens[start : start + size]
        assert output.logprobs.tolist() == logprobs[start : start + size]
        assert len(output.logprobs) == size
        check_entropies(request, output)
        check_spans(output)
        self.bench.check_kv_spans(request, output)
        self.bench.check_routes(request, output, whole=request.rid not in self.ended_early)
        if output.top is not None:
            assert output.top.ids.shape == (size, request.top_logprobs)
        if request.rid in self.ended_early:
            return
        end = start + size
        assert start == (0 if request.output_ids is None else len(request.output_ids))
        assert end == self._full_size(request, len(tokens))
        # Whatever else ends it at the same token comes first, a full pool too.
        pool = self.bench.cache.num_pages * self.bench.cache.page_size
        room = pool + 1 - len(request.prompt_ids)
        longest = min(len(tokens), request.sampling.max_new_tokens, room)
        held = 0 < request.hold_at == end < longest
        assert (output.finish.type == "hold") == held
        if size:
            assert output.kv_spans[-1].end == len(request.prompt_ids) + end - 1 or size == 1
        if request.prompt_logprob_start >= 0:
            assert output.prompt_logprobs is not None
            assert output.prompt_logprobs.tolist() == expected_prompt_logprobs(request)

    def _full_size(self, request: Request, size: int) -> int:
        """Output tokens of a request that nobody cut off: context and pool may."""
        prompt_len = len(request.prompt_ids)
        pool = self.bench.cache.num_pages * self.bench.cache.page_size
        size = size if request.hold_at < 0 else min(size, request.hold_at)
        return int(np.minimum(size, min(CONTEXT, pool + 1) - prompt_len))


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


class DividedMachine(SchedulerMachine):
    """The same of three copies of the model: what a group shares is on one of them."""

    build = CopiedBench


TestDividedScheduler = DividedMachine.TestCase
TestDividedScheduler.settings = TestScheduler.settings
