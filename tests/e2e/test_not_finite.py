"""Weights that turn to NaN after they were loaded end requests with a typed error, and only
those whose logits they reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from engine.protocol import FlushCache, Request, RequestOutput
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import tiny_hf

BAD = 7


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What several threads divide among them is summed in an order that follows from the number of
    rows, and rows that end alone leave batches of other sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_hf("llama").save_pretrained(path)
    return path


@pytest.fixture
def replica(folder: Path) -> Iterator[InlineReplica]:
    with make_replica(folder, page_size=4, max_chunk_tokens=8) as replica:
        yield replica


def weight(replica: InlineReplica, name: str) -> torch.Tensor:
    """The live tensor behind a parameter."""
    worker = replica._leader._executor._worker
    return dict(worker._model.named_parameters())[name].data


def prompts(count: int, size: int = 20) -> list[Request]:
    """Requests without the token BAD anywhere in prompt or output."""
    rng = np.random.default_rng(3)
    return [
        request(
            f"good-{i}",
            rng.integers(20, 90, size),
            seed=i,
            max_new_tokens=6,
            logit_bias={BAD: float("-inf")},
        )
        for i in range(count)
    ]


def run(replica: InlineReplica, requests: list[Request]) -> dict[str, RequestOutput]:
    replica.submit(requests)
    return drain(replica)


def check_equal(left: RequestOutput, right: RequestOutput) -> None:
    assert left.token_ids.tolist() == right.token_ids.tolist()
    assert left.logprobs.tolist() == right.logprobs.tolist()
    assert left.finish == right.finish


def check_broken(output: RequestOutput, num_tokens: int = 0) -> None:
    assert output.finish is not None
    assert (output.finish.type, output.finish.error) == ("abort", "NonFiniteLogits")
    assert len(output.token_ids) == num_tokens and np.isfinite(output.logprobs).all()


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 5},
        {"top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"logit_bias": {4: 1.0}},
    ],
)
def test_nan_weights_end_every_request(replica: InlineReplica, sampling) -> None:
    weight(replica, "model.norm.weight").fill_(float("nan"))
    requests = [request(str(i), [i + 20, 21, 22], seed=i, **sampling) for i in range(5)]
    for output in run(replica, requests).values():
        check_broken(output)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1, 9, 19])
def test_a_token_that_spoils_a_prompt_ends_that_request_alone(replica, value, at) -> None:
    good = prompts(6)
    clean = run(replica, good)
    replica.send(FlushCache())
    weight(replica, "model.embed_tokens.weight")[BAD] = value
    ids = np.arange(30, 50)
    ids[at] = BAD
    found = run(replica, [*good[:3], request("bad", ids, seed=9), *good[3:]])
    check_broken(found["bad"])
    for sent in good:
        check_equal(found[sent.rid], clean[sent.rid])


def test_a_spoilt_prefix_is_not_reused(replica: InlineReplica) -> None:
    """Neither while the fault lasts, nor after."""
    table = weight(replica, "model.embed_tokens.weight")
    ids = np.array([30, 31, BAD, 33, *range(40, 60)])
    healthy = run(replica, [request("healthy", ids, seed=9)])["healthy"]
    replica.send(FlushCache())
    row = table[BAD].clone()
    table[BAD] = float("nan")
    group = [request(f"g{i}", ids, seed=i, group="g") for i in range(4)]
    for output in run(replica, group).values():
        check_broken(output)
    table[BAD] = row
    again = run(replica, [request("again", ids, seed=9)])["again"]
    assert again.cached_tokens == 0
    check_equal(again, healthy)


def test_who_shares_only_what_lies_before_the_spoilt_token_goes_on(replica: InlineReplica) -> None:
    """It copies the first half of a page whose second half is wrong, before anybody knows."""
    ids = np.arange(30, 52)
    good = request("good", [*ids[:2], *range(60, 80)], seed=4, logit_bias={BAD: float("-inf")})
    healthy = run(replica, [good])["good"]
    replica.send(FlushCache())
    weight(replica, "model.embed_tokens.weight")[BAD] = float("nan")
    ids[2] = BAD
    replica.submit([request("bad", ids, seed=9)])
    replica.step()
    found = run(replica, [good])
    check_broken(found["bad"])
    assert found["good"].cached_tokens == 2
    # In another batch than before: the order of sums differs.
    assert found["good"].token_ids.tolist() == healthy.token_ids.tolist()
    np.testing.assert_allclose(found["good"].logprobs, healthy.logprobs, atol=1e-5)


def test_tokens_sampled_before_are_kept(replica: InlineReplica) -> None:
    weight(replica, "model.embed_tokens.weight")[BAD] = float("nan")
    sent = request("a", [30, 31], seed=1, max_new_tokens=9, logit_bias={BAD: 1e4})
    output = run(replica, [sent])["a"]
    check_broken(output, 1)
    assert output.token_ids.tolist() == [BAD]


def test_prompt_logprobs_behind_a_spoilt_token_are_not_returned(replica: InlineReplica) -> None:
    weight(replica, "model.embed_tokens.weight")[BAD] = float("nan")
    ids = [30, BAD, *range(40, 60)]
    sent = replace(request("a", ids, max_new_tokens=0), prompt_logprob_start=0)
    output = run(replica, [sent])["a"]
    check_broken(output)
    good = replace(request("b", range(40, 60), max_new_tokens=0), prompt_logprob_start=0)
    scores = run(replica, [good])["b"].prompt_logprobs
    assert scores is not None and len(scores) == 19 and np.isfinite(scores).all()


def test_pages_of_a_spoilt_request_serve_the_next(folder: Path) -> None:
    """Every page is taken over, half filled ones too, and nothing is left of the fault."""
    with make_replica(folder, page_size=4, num_pages=16, max_running=2) as replica:
        good = prompts(8, size=30)
        clean = run(replica, good)
        replica.send(FlushCache())
        weight(replica, "model.embed_tokens.weight")[BAD] = float("nan")
        ids = [*range(30, 58), BAD]
        check_broken(run(replica, [request("bad", ids)])["bad"])
        found = run(replica, good)
        for sent in good:
            check_equal(found[sent.rid], clean[sent.rid])


@pytest.mark.gpu
def test_on_a_gpu_a_spoilt_prompt_ends_alone_and_leaves_no_prefix(folder: Path) -> None:
    """There NaN stays in the KV pool, in pages that others get next."""
    with make_replica(folder, page_size=4, max_chunk_tokens=8, device="cuda") as replica:
        table = weight(replica, "model.embed_tokens.weight")
        row = table[BAD].clone()
        table[BAD] = float("nan")
        ids = np.array([30, 31, BAD, 33, *range(40, 60)])
        good = prompts(6)
        for turn in range(3):
            sent = [replace(one, rid=f"{turn}-{one.rid}") for one in good]
            found = run(replica, [*sent[:3], request(f"{turn}-bad", ids, seed=9), *sent[3:]])
            check_broken(found.pop(f"{turn}-bad"))
            assert all(one.finish.type == "length" for one in found.values())
            assert all(np.isfinite(one.logprobs).all() for one in found.values())
        table[BAD] = row
        again = run(replica, [request("again", ids, seed=9)])["again"]
        assert again.cached_tokens == 0 and np.isfinite(again.logprobs).all()
