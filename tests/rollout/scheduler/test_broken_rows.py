"""A row whose numbers are not finite ends alone, with a typed error."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from engine.protocol import PromptLogprobs, Request, StepPlan, StepResult, TopLogprobs
from tests.helpers.mock_executor import MockExecutor
from tests.helpers.scheduling import Bench, check_output, expected, make_request

NAN, INF = float("nan"), float("inf")


class Poisoned(MockExecutor):
    """Spoils what it returns of the rows with some seeds.

    spoil: "logprobs", "entropies" or "top"; at: output tokens a row returns before.
    """

    def __init__(self, seeds: set[int], value: float, *, spoil: str, at: int, **sizes: int) -> None:
        super().__init__(**sizes)
        self.seeds, self.value, self.spoil, self.at = seeds, value, spoil, at

    def step(self, plan: StepPlan) -> StepResult:
        result = super().step(plan)
        rows = [self._rows[int(slot)].new for slot in plan.slots[plan.samples]]
        lens = plan.kv_lens[plan.samples]
        wrong = [
            row.sampling.seed in self.seeds and length - row.prompt_len >= self.at
            for row, length in zip(rows, lens.tolist(), strict=True)
        ]
        if self.spoil == "top" and result.top is not None:
            values = result.top.logprobs.copy()
            values[wrong, 0] = self.value
            return replace(result, top=TopLogprobs(result.top.ids, values))
        if self.spoil == "prompt":
            return replace(result, prompt=[self._spoilt(plan, part) for part in result.prompt])
        name = self.spoil if self.spoil == "entropies" else "logprobs"
        found = getattr(result, name)
        if found is None:
            return result
        return replace(result, **{name: np.where(wrong, np.float32(self.value), found)})

    def _spoilt(self, plan: StepPlan, part: PromptLogprobs) -> PromptLogprobs:
        if self._rows[int(plan.slots[part.row])].new.sampling.seed not in self.seeds:
            return part
        return replace(part, logprobs=np.full_like(part.logprobs, self.value))


def bench_of(seeds: set[int], value: float, *, spoil: str, at: int, overlap: bool) -> Bench:
    bench = Bench(overlap=overlap)
    bench.executor = Poisoned(
        seeds, value, spoil=spoil, at=at, num_pages=256, page_size=4, vocab_size=97
    )
    return bench


def check_broken(request: Request, output, at: int) -> None:
    finish = output.finish
    assert finish is not None
    assert (finish.type, finish.error) == ("abort", "NonFiniteLogits")
    tokens, logprobs = expected(request)
    assert output.token_ids.tolist() == tokens[:at]
    assert output.logprobs.tolist() == logprobs[:at]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_one_row_of_many_ends_and_the_others_are_as_alone(overlap, value, at, stream):
    bench = bench_of({5}, value, spoil="logprobs", at=at, overlap=overlap)
    requests = [
        make_request(str(seed), range(seed, seed + 9), max_new=8, seed=seed, stream=stream)
        for seed in range(12)
    ]
    bench.add(*requests)
    outputs = bench.run()
    for request in requests:
        if request.seed == 5:
            check_broken(request, outputs["5"], at)
        else:
            check_output(request, outputs[request.rid])


@pytest.mark.parametrize("spoil", ["entropies", "top", "prompt"])
def test_every_number_that_was_asked_for_is_looked_at(spoil):
    bench = bench_of({1}, NAN, spoil=spoil, at=0, overlap=False)
    asks = {"entropy": True, "top_logprobs": 2, "prompt_logprob_start": 0}
    requests = [make_request(str(s), range(9), seed=s, max_new=4, **asks) for s in range(3)]
    bench.add(*requests)
    outputs = bench.run()
    check_broken(requests[1], outputs["1"], 0)
    for request in (requests[0], requests[2]):
        check_output(request, outputs[request.rid])


def test_an_entropy_nobody_asked_for_ends_nothing():
    bench = bench_of({0}, NAN, spoil="entropies", at=0, overlap=False)
    requests = [make_request(str(s), range(9), seed=s, entropy=s == 1) for s in range(2)]
    bench.add(*requests)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])


def test_a_banned_token_among_the_likeliest_ends_nothing():
    bench = bench_of({0}, -INF, spoil="top", at=0, overlap=False)
    request = make_request("a", range(9), seed=0, top_logprobs=2)
    bench.add(request)
    check_output(request, bench.run()["a"])


@pytest.mark.parametrize("at", [0, 6])
def test_its_kv_leaves_the_prefix_cache(at):
    """Also the prefix that it took over, which may be what spoilt it."""
    bench = bench_of({7}, NAN, spoil="logprobs", at=at, overlap=False)
    bench.add(make_request("first", range(16), seed=1, max_new=2))
    bench.run()
    assert bench.cache.num_cached > 0
    bench.add(make_request("bad", [*range(16), 50, 51, 52, 53], seed=7, max_new=20))
    assert bench.run()["bad"].cached_tokens == 16
    assert bench.cache.num_cached == 0
    bench.add(make_request("after", [*range(16), 50], seed=2, max_new=2))
    assert bench.run()["after"].cached_tokens == 0


def test_samples_that_share_its_prompt_go_on():
    bench = bench_of({2}, NAN, spoil="logprobs", at=2, overlap=False)
    requests = [make_request(f"g-{s}", range(18), seed=s, group="g", max_new=9) for s in range(4)]
    bench.add(*requests)
    outputs = bench.run()
    check_broken(requests[2], outputs["g-2"], 2)
    for request in (*requests[:2], requests[3]):
        check_output(request, outputs[request.rid])


def test_a_prompt_that_is_only_scored_ends_too():
    bench = bench_of({3}, NAN, spoil="prompt", at=0, overlap=False)
    bench.add(make_request("a", range(9), seed=3, max_new=0, prompt_logprob_start=0))
    output = bench.run()["a"]
    assert output.finish is not None and output.finish.error == "NonFiniteLogits"


def test_one_that_was_retracted_before_ends_too():
    bench = bench_of({4}, NAN, spoil="logprobs", at=5, overlap=False)
    request = make_request("a", range(9), seed=4, max_new=9)
    bench.add(request)
    for _ in range(4):
        bench.step()
    bench.scheduler.pause("retract")
    bench.scheduler.resume()
    check_broken(request, bench.run()["a"], 5)
