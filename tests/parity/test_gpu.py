"""The GPU engine (Triton back end and kernels) against the CPU engine and a plain forward."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from engine.errors import InvalidRequest
from rollout.requests.generate import classify_request, embed_request
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.rounding import stored_logprob_bound
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge import push

pytestmark = pytest.mark.gpu

PROMPT = list(range(5, 60))


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "olmo2", "smollm3", "gemma3"])
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder, request.param, head_dim=64, max_position_embeddings=256)


def probes() -> list:
    common = {"max_new_tokens": 40}
    return [
        *[request(f"group-{i}", PROMPT, seed=i, group="g", **common) for i in range(6)],
        request("greedy", PROMPT[:31], temperature=0.0, **common),
        request("cold", PROMPT[:7], seed=8, temperature=0.5, **common),
        request("filtered", PROMPT[:20], seed=9, top_k=10, top_p=0.9, **common),
        request("penalised", PROMPT[:20], seed=10, frequency_penalty=0.5, **common),
    ]


def run(folder, device: str, **options):
    with make_replica(folder, device=device, **options) as replica:
        replica.submit(probes())
        return drain(replica), replica.state()


def test_float32_gives_the_tokens_of_the_cpu(tiny) -> None:
    on_cpu, _ = run(tiny[0], "cpu")
    on_gpu, state = run(tiny[0], "cuda")
    assert state.attention == "triton"
    for rid, want in on_cpu.items():
        assert on_gpu[rid].token_ids.tolist() == want.token_ids.tolist(), rid
        np.testing.assert_allclose(on_gpu[rid].logprobs, want.logprobs, atol=1e-4, err_msg=rid)


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_cache": False},
        {"max_chunk_tokens": 16, "max_step_tokens": 48},
        {"num_pages": 40, "prefix_cache": False},
    ],
    ids=["no prefix cache", "chunks", "retraction"],
)
def test_float32_does_not_depend_on_how_it_was_scheduled(tiny, options) -> None:
    plain, _ = run(tiny[0], "cuda")
    other, _ = run(tiny[0], "cuda", **options)
    for rid, want in plain.items():
        assert other[rid].token_ids.tolist() == want.token_ids.tolist(), rid
        np.testing.assert_allclose(other[rid].logprobs, want.logprobs, atol=1e-4, err_msg=rid)


def test_bfloat16_logprobs_are_close_to_float32(tiny) -> None:
    outputs, _ = run(tiny[0], "cuda", dtype="bfloat16")
    for rid in ("group-0", "greedy"):
        output = outputs[rid]
        prompt = PROMPT if rid == "group-0" else PROMPT[:31]
        want = exact_logprobs(tiny[1], prompt, output.token_ids)
        np.testing.assert_allclose(output.logprobs, want, atol=0.3, err_msg=rid)
        assert np.abs(output.logprobs - want).mean() < 0.05


def test_float16_logprobs_are_those_of_transformers_in_float16(tiny) -> None:
    """Fused products of few rows, captured steps and a group; also without any of them."""
    folder, model = tiny
    if model.config.model_type == "gemma3_text":
        with pytest.raises(InvalidRequest, match="float16"):
            run(folder, "cuda", dtype="float16")
        return
    half = copy.deepcopy(model).half()
    bound = stored_logprob_bound(model.config, 2.0**-11)
    for options in ({}, {"cuda_graphs": False, "prefix_cache": False, "max_chunk_tokens": 16}):
        outputs, _ = run(folder, "cuda", dtype="float16", **options)
        for rid, prompt in (("group-0", PROMPT), ("group-5", PROMPT), ("greedy", PROMPT[:31])):
            want = exact_logprobs(half, prompt, outputs[rid].token_ids)
            np.testing.assert_allclose(outputs[rid].logprobs, want, atol=bound, err_msg=rid)


def test_a_push_from_gpu_tensors_is_served(tiny) -> None:
    arch = tiny[1].config.model_type.removesuffix("_text")
    new = tiny_hf(arch, seed=1, head_dim=64, max_position_embeddings=256)
    with make_replica(tiny[0], device="cuda") as replica:
        push(new.cuda(), 1, replica)
        replica.submit([request("after", PROMPT, seed=3)])
        output = drain(replica)["after"]
    want = exact_logprobs(new.cpu(), PROMPT, output.token_ids)
    np.testing.assert_allclose(output.logprobs, want, atol=1e-3)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_classifier_scores_as_on_the_cpu(dtype: str, atol: float, tmp_path) -> None:
    """Whole prompts, chunks, and rows of one token, which a graph of decode steps must not take."""
    sizes = {"head_dim": 64, "max_position_embeddings": 256, "num_labels": 3}
    write_tiny(tmp_path, "qwen3", classifier=True, **sizes)
    asked = {f"n{n}": np.array(PROMPT[:n], np.int32) for n in (1, 3, 40, 55)}
    found = {}
    for device in ("cpu", "cuda"):
        with make_replica(tmp_path, device=device, dtype=dtype, max_chunk_tokens=16) as replica:
            for turn in ("first", "cached"):
                replica.submit([classify_request(rid, ids) for rid, ids in asked.items()])
                for rid, output in drain(replica).items():
                    found[device, turn, rid] = output.scores
    for turn in ("first", "cached"):
        for rid in asked:
            got, want = found["cuda", turn, rid], found["cpu", "first", rid]
            np.testing.assert_allclose(got, want, atol=atol, err_msg=f"{turn} {rid}")


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-4), ("bfloat16", 0.2)])
def test_prompts_are_embedded_as_on_the_cpu(dtype: str, atol: float, tmp_path) -> None:
    """Beside rows that decode in graphs before and after, whose tokens stay what they are."""
    write_tiny(tmp_path, "qwen3", head_dim=64, max_position_embeddings=256)
    asked = {
        f"{pooling} {n}": embed_request(
            f"{pooling} {n}", np.array(PROMPT[:n], np.int32), pooling=pooling
        )
        for pooling in ("last", "mean")
        for n in (1, 3, 40, 55)
    }
    found, tokens = {}, {}
    for device in ("cpu", "cuda"):
        with make_replica(tmp_path, device=device, dtype=dtype, max_chunk_tokens=16) as replica:
            replica.submit([request("alone", PROMPT[:9], seed=3, max_new_tokens=30)])
            alone = drain(replica)["alone"].token_ids.tolist()
            for turn in ("first", "cached"):
                replica.submit([request("both", PROMPT[:9], seed=3, max_new_tokens=30)])
                for _ in range(4):
                    replica.step()
                replica.submit(list(asked.values()))
                outputs = drain(replica)
                tokens[device, turn] = outputs.pop("both").token_ids.tolist() == alone
                for rid, output in outputs.items():
                    found[device, turn, rid] = output.embedding
    for turn in ("first", "cached"):
        for rid in asked:
            got, want = found["cuda", turn, rid], found["cpu", "first", rid]
            np.testing.assert_allclose(got, want, atol=atol, err_msg=f"{turn} {rid}")
    if dtype == "float32":
        assert all(tokens.values()), tokens
