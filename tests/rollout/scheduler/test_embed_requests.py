"""Requests that end with an embedding of their prompt, beside others that generate."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.config import SpeculativeConfig
from engine.errors import InvalidRequest
from engine.protocol import Request, RequestOutput, StepPlan
from rollout.scheduler.validate import Limits, check_request
from tests.helpers.mock_executor import embedding
from tests.helpers.scheduling import Bench, check_output, make_request

LIMITS = Limits(context_length=32, vocab_size=50, kv_tokens=24)


def embed(rid: str, prompt, pooling: str = "last", **fields: object) -> Request:
    return make_request(rid, prompt, task="embed", pooling=pooling, **fields)


def check(request: Request, output: RequestOutput) -> None:
    assert output.finish is not None and output.finish.type == "length", output.finish
    assert len(output.token_ids) == 0 and output.spans == []
    assert output.embedding is not None and output.scores is None
    want = embedding(request.prompt_ids.tolist(), request.pooling)
    assert output.embedding.tolist() == want, request.rid


@pytest.mark.parametrize("overlap", [False, True])
def test_it_ends_with_its_last_chunk_and_samples_nothing(overlap: bool) -> None:
    bench = Bench(overlap=overlap, max_chunk_tokens=16, max_step_tokens=16)
    request = embed("a", range(40), "mean")
    bench.add(request)
    check(request, bench.run()["a"])
    assert [plan.query_lens.tolist() for plan in bench.plans] == [[16], [16], [8]]
    assert not any(plan.samples.any() for plan in bench.plans)
    assert bench.scheduler.stats().num_output_tokens == 0


def test_a_mean_takes_no_cached_prefix_and_leaves_one() -> None:
    bench = Bench()
    for number, pooling in enumerate(("last", "mean", "last")):
        request = embed(str(number), range(21), pooling, seed=number)
        bench.add(request)
        output = bench.run()[request.rid]
        check(request, output)
        assert output.cached_tokens == (20 if number == 2 else 0)
    assert bench.executor.num_computed == 21 + 21 + 1


@pytest.mark.parametrize("speculative", [False, True])
def test_embeddings_do_not_depend_on_the_schedule(speculative: bool) -> None:
    rng = random.Random(5)
    for trial in range(24):
        drafts = SpeculativeConfig(method="ngram") if speculative else None
        bench = Bench(
            overlap=trial % 2 == 0,
            speculative=drafts,
            num_pages=rng.choice([24, 32, 64]),
            prefix_cache=rng.random() < 0.7,
            max_running=rng.randint(1, 6),
            max_step_tokens=rng.choice([6, 16, 64]),
            max_chunk_tokens=rng.choice([4, 9, 32]),
        )
        shared = [rng.randrange(90) for _ in range(30)]
        requests = []
        for number in range(rng.randint(2, 14)):
            prompt = [*shared[: rng.randint(1, 30)], *range(rng.randint(0, 20))]
            rid, policy = f"{trial}-{number}", rng.choice(["keep", "recompute", "fresh"])
            fields = {"seed": number, "kv_policy": policy, "priority": rng.randint(0, 2)}
            if rng.random() < 0.3:
                requests.append(make_request(rid, prompt, max_new=6, **fields))
            else:
                requests.append(embed(rid, prompt, rng.choice(["last", "mean"]), **fields))
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
            bench.check_kv_spans(request, outputs[request.rid])
            if request.task == "embed":
                check(request, outputs[request.rid])
            else:
                check_output(request, outputs[request.rid])


def test_an_abort_has_no_embedding_and_the_others_go_on() -> None:
    bench = Bench(overlap=True, max_chunk_tokens=8, max_step_tokens=16)
    gone, stays = embed("gone", range(40), "mean"), embed("stays", range(50, 90), "mean")
    bench.add(gone, stays)
    bench.step()
    bench.keep(bench.scheduler.abort(rid="gone"))
    outputs = bench.run()
    assert outputs["gone"].finish.type == "abort" and outputs["gone"].embedding is None
    check(stays, outputs["stays"])


def test_an_embedding_that_is_not_finite_ends_its_request_alone(monkeypatch) -> None:
    bench = Bench()
    bad, good = embed("bad", [1, 2, 3], seed=1), embed("good", [4, 5, 6], seed=2)
    bench.add(bad, good)
    step = bench.executor.step

    def spoilt(plan: StepPlan):
        result = step(plan)
        result.embeddings[0].values[1] = np.inf
        return result

    monkeypatch.setattr(bench.executor, "step", spoilt)
    outputs = bench.run()
    assert outputs["bad"].finish.error == "NonFiniteLogits" and outputs["bad"].embedding is None
    check(good, outputs["good"])


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("stop", embed("a", [1], stop="x")),
        ("stream", embed("a", [1], stream=True)),
        ("top_logprobs", embed("a", [1], top_logprobs=1)),
        ("prompt_logprob_start", embed("a", [1], prompt_logprob_start=0)),
        ("pooling", embed("a", [1], "max")),
        ("prompt_ids", embed("a", [])),
        ("prompt_ids", embed("a", [1] * 25)),
    ],
)
def test_what_speaks_of_sampled_tokens_is_refused(field: str, request_: Request) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_request(request_, LIMITS)
    assert caught.value.field == field
    assert field in caught.value.message


def test_a_classifier_embeds_nothing() -> None:
    limits = Limits(context_length=32, vocab_size=50, kv_tokens=64, num_labels=2)
    with pytest.raises(InvalidRequest, match="can only classify") as caught:
        check_request(embed("a", [1]), limits)
    assert caught.value.field == "task"


def test_a_prompt_to_embed_may_fill_the_context() -> None:
    limits = Limits(context_length=32, vocab_size=50, kv_tokens=64)
    check_request(embed("a", [1] * 32), limits)
    with pytest.raises(InvalidRequest, match="context of 32"):
        check_request(embed("a", [1] * 33), limits)
