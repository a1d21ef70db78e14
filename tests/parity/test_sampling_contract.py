"""The sampling contract (DESIGN, decision 9): a request's tokens and logprobs do not depend
on its company, on retraction, on pauses, on chunking or on the prefix cache."""

from __future__ import annotations

import numpy as np
import pytest

from engine.protocol import Pause, Resume
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.tiny_models import write_tiny

PROMPT = list(range(5, 30))
OTHERS = np.random.default_rng(0).integers(3, 100, size=(63, 40))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder, "llama")


def probes() -> list:
    """Requests of every kind of sampling, over one prompt."""
    common = {"max_new_tokens": 20}
    return [
        request("plain", PROMPT, seed=1, **common),
        request("cold", PROMPT, seed=2, temperature=0.6, **common),
        request("greedy", PROMPT, seed=3, temperature=0.0, **common),
        request("filtered", PROMPT, seed=4, top_k=20, top_p=0.9, min_p=0.01, **common),
        request("penalised", PROMPT, seed=5, frequency_penalty=0.5, repetition_penalty=1.2),
        request("biased", PROMPT, seed=6, logit_bias={7: 2.0, 8: -3.0}, **common),
    ]


def results(outputs) -> dict[str, tuple[list[int], np.ndarray]]:
    return {rid: (out.token_ids.tolist(), out.logprobs) for rid, out in outputs.items()}


@pytest.fixture(scope="module")
def alone(tiny):
    """Each probe by itself on an engine without a prefix cache: the reference."""
    found = {}
    for probe in probes():
        with make_replica(tiny[0], prefix_cache=False) as replica:
            replica.submit([probe])
            found.update(results(drain(replica)))
    return found


def assert_same(outputs, alone) -> None:
    for rid, (tokens, logprobs) in alone.items():
        got_tokens, got_logprobs = results(outputs)[rid]
        assert got_tokens == tokens, rid
        np.testing.assert_allclose(got_logprobs, logprobs, atol=1e-5, err_msg=rid)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_in_a_batch_of_64(tiny, alone, prefix_cache: bool) -> None:
    with make_replica(tiny[0], prefix_cache=prefix_cache) as replica:
        company = [
            request(f"other-{i}", OTHERS[i, : 10 + i % 30], seed=i, max_new_tokens=5 + i % 20)
            for i in range(58)
        ]
        replica.submit([*company[:29], *probes(), *company[29:]])
        assert_same(drain(replica), alone)


def test_when_the_prompt_is_cached_from_before(tiny, alone) -> None:
    with make_replica(tiny[0]) as replica:
        replica.submit([request("warm", [*PROMPT, 31, 32], seed=9)])
        drain(replica)
        replica.submit(probes())
        outputs = drain(replica)
        assert_same(outputs, alone)
        assert outputs["plain"].cached_tokens == len(PROMPT) - 1


def test_in_chunks_of_four_tokens(tiny, alone) -> None:
    with make_replica(tiny[0], max_chunk_tokens=4, max_step_tokens=8) as replica:
        replica.submit(probes())
        assert_same(drain(replica), alone)


def test_after_retraction(tiny, alone) -> None:
    """A page pool that cannot hold all six to their end."""
    with make_replica(tiny[0], num_pages=16, prefix_cache=False) as replica:
        replica.submit(probes())
        outputs = drain(replica)
        assert_same(outputs, alone)
        assert sum(output.num_retractions for output in outputs.values()) > 0


@pytest.mark.parametrize("mode", ["keep", "retract"])
def test_across_pauses(tiny, alone, mode: str) -> None:
    with make_replica(tiny[0]) as replica:
        replica.submit(probes())
        finals = {}
        for _ in range(200):
            for output in replica.step():
                if output.finish is not None:
                    finals[output.rid] = output
            replica.send(Pause(mode=mode))
            assert replica.step() == []
            replica.send(Resume())
            if replica.idle():
                break
        assert_same(finals, alone)


def test_logprobs_are_those_of_a_plain_forward(tiny, alone) -> None:
    """At the sampling temperature, before filters; greedy at temperature 1."""
    for rid, temperature in {"plain": 1.0, "cold": 0.6, "greedy": 1.0, "filtered": 1.0}.items():
        tokens, logprobs = alone[rid]
        want = exact_logprobs(tiny[1], PROMPT, tokens, temperature)
        np.testing.assert_allclose(logprobs, want, atol=1e-4, err_msg=rid)


def test_samples_of_a_group_share_the_prompt_and_differ(tiny) -> None:
    with make_replica(tiny[0]) as replica:
        replica.submit([request(f"s-{i}", PROMPT, seed=i, group="g") for i in range(8)])
        outputs = drain(replica)
        state = replica.state()
    assert len({tuple(out.token_ids.tolist()) for out in outputs.values()}) == 8
    computed = state.num_prompt_tokens - state.num_cached_tokens
    assert computed == len(PROMPT) + 7, "seven samples compute the last prompt token alone"


def test_prompt_logprobs_equal_a_plain_forward(tiny) -> None:
    from engine.protocol import Request, SamplingParams

    probe = Request(
        rid="p",
        prompt_ids=np.array(PROMPT, dtype=np.int32),
        sampling=SamplingParams(max_new_tokens=2),
        seed=0,
        prompt_logprob_start=0,
        top_logprobs=3,
    )
    want = exact_logprobs(tiny[1], PROMPT[:1], PROMPT[1:])
    with make_replica(tiny[0], max_chunk_tokens=7, max_step_tokens=7) as replica:
        for _ in range(2):  # the second time the prompt is in the cache
            replica.submit([probe])
            output = drain(replica)["p"]
            assert output.prompt_logprobs is not None and output.prompt_top is not None
            np.testing.assert_allclose(output.prompt_logprobs, want, atol=1e-4)
            assert output.prompt_top.ids.shape == (len(PROMPT) - 1, 3)
            assert output.top is not None and output.top.ids.shape == (2, 3)
            best = output.top.logprobs[:, 0]
            assert (best >= output.logprobs - 1e-6).all()


def test_bfloat16_keeps_the_tokens_of_a_request_alone_and_in_company(tiny) -> None:
    """Not promised bitwise, but greedy text of a peaked model must not fall apart."""
    with make_replica(tiny[0], dtype="bfloat16") as replica:
        replica.submit(probes())
        outputs = drain(replica)
    for rid in ("plain", "greedy"):
        tokens = outputs[rid].token_ids.tolist()
        want = exact_logprobs(tiny[1], PROMPT, tokens)
        np.testing.assert_allclose(outputs[rid].logprobs, want, atol=0.15, err_msg=rid)
