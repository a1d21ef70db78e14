"""Requests that nothing is generated for: planned as prompts, over with their last chunk."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.protocol import Request, RequestOutput, StepPlan
from rollout.scheduler.validate import Limits, check_request
from tests.helpers.mock_executor import prefix_hashes, score
from tests.helpers.scheduling import Bench, make_request

LABELS = 3
LIMITS = Limits(context_length=32, vocab_size=50, kv_tokens=24, num_labels=LABELS)


def classify(rid: str, prompt, **fields: object) -> Request:
    return make_request(rid, prompt, task="classify", **fields)


def check(request: Request, output: RequestOutput) -> None:
    assert output.finish is not None and output.finish.type == "length", output.finish
    assert len(output.token_ids) == 0 and output.spans == []
    assert output.scores is not None
    want = score(prefix_hashes(request.prompt_ids.tolist())[-1], LABELS)
    assert output.scores.tolist() == want, request.rid


@pytest.mark.parametrize("overlap", [False, True])
def test_it_ends_with_its_last_chunk(overlap: bool) -> None:
    bench = Bench(num_labels=LABELS, overlap=overlap, max_chunk_tokens=16, max_step_tokens=16)
    request = classify("a", range(40))
    bench.add(request)
    check(request, bench.run()["a"])
    assert [plan.query_lens.tolist() for plan in bench.plans] == [[16], [16], [8]]
    assert [plan.samples.tolist() for plan in bench.plans] == [[False], [False], [True]]
    assert bench.scheduler.stats().num_output_tokens == 0


def test_equal_prompts_are_computed_once_and_each_is_scored() -> None:
    bench = Bench(num_labels=LABELS)
    requests = [classify(f"s{n}", range(21), group="g", seed=n) for n in range(4)]
    bench.add(*requests)
    outputs = bench.run()
    for request in requests:
        check(request, outputs[request.rid])
    # The last token of each is computed: its hidden state is wanted.
    assert bench.executor.num_computed == 21 + 3


def test_scores_do_not_depend_on_the_schedule() -> None:
    rng = random.Random(3)
    for overlap in (False, True):
        for trial in range(20):
            bench = Bench(
                num_labels=LABELS,
                overlap=overlap,
                num_pages=rng.choice([16, 24, 64]),
                prefix_cache=rng.random() < 0.7,
                max_running=rng.randint(1, 6),
                max_step_tokens=rng.choice([6, 16, 64]),
                max_chunk_tokens=rng.choice([4, 9, 32]),
            )
            shared = [rng.randrange(90) for _ in range(30)]
            requests = [
                classify(
                    f"{trial}-{n}",
                    [*shared[: rng.randint(1, 30)], *range(rng.randint(0, 20))],
                    seed=n,
                    priority=rng.randint(0, 2),
                    kv_policy=rng.choice(["keep", "recompute", "fresh"]),
                )
                for n in range(rng.randint(1, 14))
            ]
            waiting, version = list(requests), 0
            for _ in range(rng.randint(1, 30)):
                bench.add(*[waiting.pop() for _ in range(min(len(waiting), rng.randint(0, 3)))])
                if not bench._results and rng.random() < 0.1:
                    version += 1
                    bench.set_version(version)
                if rng.random() < 0.1:
                    bench.scheduler.pause("retract")
                    bench.scheduler.resume()
                bench.step()
            bench.add(*waiting)
            outputs = bench.run()
            for request in requests:
                check(request, outputs[request.rid])
                bench.check_kv_spans(request, outputs[request.rid])


def test_an_abort_has_no_scores_and_the_others_go_on() -> None:
    bench = Bench(num_labels=LABELS, overlap=True, max_chunk_tokens=8, max_step_tokens=16)
    gone, stays = classify("gone", range(40), seed=1), classify("stays", range(50, 90), seed=2)
    bench.add(gone, stays)
    bench.step()
    bench.keep(bench.scheduler.abort(rid="gone"))
    outputs = bench.run()
    assert outputs["gone"].finish.type == "abort" and outputs["gone"].scores is None
    check(stays, outputs["stays"])


def test_scores_that_are_not_finite_end_their_request_alone(monkeypatch) -> None:
    bench = Bench(num_labels=LABELS)
    bad, good = classify("bad", [1, 2, 3], seed=1), classify("good", [4, 5, 6], seed=2)
    bench.add(bad, good)
    step = bench.executor.step

    def spoilt(plan: StepPlan):
        result = step(plan)
        result.scores[0, LABELS - 1] = np.nan
        return result

    monkeypatch.setattr(bench.executor, "step", spoilt)
    outputs = bench.run()
    assert outputs["bad"].finish.error == "NonFiniteLogits" and outputs["bad"].scores is None
    check(good, outputs["good"])


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("task", make_request("a", [1])),
        ("stop", classify("a", [1], stop="x")),
        ("stream", classify("a", [1], stream=True)),
        ("top_logprobs", classify("a", [1], top_logprobs=1)),
        ("logprob_ids", classify("a", [1], logprob_ids=[1])),
        ("prompt_logprob_start", classify("a", [1], prompt_logprob_start=0)),
        ("entropy", classify("a", [1], entropy=True)),
        ("output_ids", classify("a", [1], output_ids=np.array([1], np.int32))),
        ("hold_at", classify("a", [1], hold_at=3)),
        ("draft_tokens", classify("a", [1], draft_tokens=0)),
        ("forced_acceptance", classify("a", [1], forced_acceptance=0.5)),
        ("prompt_ids", classify("a", [])),
        ("prompt_ids", classify("a", [50])),
        ("prompt_ids", classify("a", [1] * 25)),
    ],
)
def test_what_speaks_of_sampled_tokens_is_refused(field: str, request_: Request) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request(request_, LIMITS)
    assert caught.value.field == field
    assert field in caught.value.message


def test_a_model_that_generates_has_no_scores() -> None:
    limits = Limits(context_length=32, vocab_size=50, kv_tokens=64)
    with pytest.raises(InvalidRequest, match="ForSequenceClassification") as caught:
        check_request(classify("a", [1]), limits)
    assert caught.value.field == "task"


def test_a_prompt_to_score_may_fill_the_context() -> None:
    limits = Limits(context_length=32, vocab_size=50, kv_tokens=64, num_labels=1)
    check_request(classify("a", [1] * 32), limits)
    with pytest.raises(InvalidRequest, match="context of 32"):
        check_request(classify("a", [1] * 33), limits)
