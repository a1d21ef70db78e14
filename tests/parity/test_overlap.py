"""The overlapped loop against the plain one: the same outputs, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from engine.protocol import Abort, Pause, Resume
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.replicas import inline, make_request
from tests.helpers.tiny_models import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-overlap")
    write_tiny(folder, "qwen2", head_dim=64, max_position_embeddings=256)
    return folder


def probes() -> list:
    prompt = list(range(5, 40))
    many = [
        request(f"group-{i}", prompt, seed=i, group="g", max_new_tokens=5 + 3 * i, stop_ids=[7, 9])
        for i in range(9)
    ]
    return [
        *many,
        request("greedy", prompt[:9], temperature=0.0, max_new_tokens=30),
        request("one", prompt[:4], seed=5, max_new_tokens=1),
        request("none", prompt[:4], seed=5, max_new_tokens=0),
        request("penalised", prompt[:20], seed=6, presence_penalty=0.4),
    ]


def assert_same(got: dict, want: dict, *, exact: bool) -> None:
    assert got.keys() == want.keys()
    for rid, output in want.items():
        assert got[rid].token_ids.tolist() == output.token_ids.tolist(), rid
        assert got[rid].finish == output.finish, rid
        if exact:
            np.testing.assert_array_equal(got[rid].logprobs, output.logprobs, err_msg=rid)
        else:
            np.testing.assert_allclose(got[rid].logprobs, output.logprobs, atol=1e-4, err_msg=rid)


def run(folder, overlap: bool, **options):
    with make_replica(folder, overlap=overlap, **options) as replica:
        replica.submit(probes())
        return drain(replica)


@pytest.mark.parametrize("num_pages", [400, 24], ids=["roomy", "retraction"])
def test_a_real_engine_gives_the_same_outputs(tiny, num_pages: int) -> None:
    plain = run(tiny, False, num_pages=num_pages)
    assert_same(run(tiny, True, num_pages=num_pages), plain, exact=False)


@pytest.mark.gpu
def test_a_steady_batch_on_a_gpu_is_bit_equal(tiny) -> None:
    requests = [request(f"{i}", range(5, 30), seed=i, max_new_tokens=40) for i in range(16)]
    outputs = []
    for overlap in (False, True):
        with make_replica(tiny, device="cuda", dtype="bfloat16", overlap=overlap) as replica:
            replica.submit(requests)
            outputs.append(drain(replica))
    assert_same(outputs[1], outputs[0], exact=True)


@pytest.mark.gpu
@pytest.mark.parametrize("num_pages", [400, 24], ids=["roomy", "retraction"])
def test_mixed_requests_on_a_gpu_give_the_same_tokens(tiny, num_pages: int) -> None:
    plain = run(tiny, False, device="cuda", num_pages=num_pages)
    assert_same(run(tiny, True, device="cuda", num_pages=num_pages), plain, exact=False)


def test_without_a_model_every_bit_is_equal_under_pressure() -> None:
    outputs = []
    for overlap in (False, True):
        with inline(num_pages=40, overlap=overlap) as replica:
            replica.submit(
                [
                    make_request(f"r{i}", [100 + i, 2, 3], max_new_tokens=3 + i % 40)
                    for i in range(80)
                ]
            )
            outputs.append(drain(replica))
    assert_same(outputs[1], outputs[0], exact=True)


def test_a_command_finds_no_step_in_flight() -> None:
    with inline(overlap=True) as replica:
        replica.submit([make_request("a", [1, 2], max_new_tokens=50)])
        replica.submit([make_request("b", [3, 4], max_new_tokens=50)])
        for _ in range(10):
            replica.step()
        replica.send(Pause(mode="retract"))
        assert replica.state().num_running == 0
        known = replica.state().num_output_tokens
        assert replica.step() == []
        assert replica.state().num_output_tokens == known
        replica.send(Abort(rid="a"))
        replica.send(Resume())
        finals = drain(replica)
    assert len(finals["a"].token_ids) == known // 2
    assert len(finals["b"].token_ids) == 50
