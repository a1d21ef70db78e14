"""Scores of sequence classifiers through the whole engine on a CPU, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from engine.errors import ManifestMismatch
from engine.models.registry import ARCHITECTURES, CLASSIFIERS
from engine.protocol import Pause, Resume
from rollout.replica.inline import InlineReplica
from rollout.requests.generate import classify_request
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge import push

TOLERANCE = 1e-4
PROMPT = list(range(5, 60))
PROMPTS = {
    # One that begins like another, one that is the same, one of a single token.
    "long": PROMPT,
    "same": PROMPT,
    "branch": [*PROMPT[:40], 7, 8, 9],
    "short": PROMPT[:3],
    "one": [42],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_labels": 1}),
    "llama tied, three labels": ("llama", {"num_labels": 3, "tie_word_embeddings": True}),
    "mistral with windows": ("mistral", {"num_labels": 2, "sliding_window": 19}),
    "qwen2": ("qwen2", {"num_labels": 1}),
    "qwen3": ("qwen3", {"num_labels": 5}),
    "olmo2": ("olmo2", {"num_labels": 1}),
    "smollm3": ("smollm3", {"num_labels": 1}),
    "gemma3": ("gemma3", {"num_labels": 1}),
    "qwen2 with experts": ("qwen2_moe", {"num_labels": 1}),
    "qwen3 with experts": ("qwen3_moe", {"num_labels": 2}),
    "mixtral": ("mixtral", {"num_labels": 1}),
}


def write(folder: Path, family: str = "llama", **overrides: Any) -> Any:
    return write_tiny(folder, family, classifier=True, **{"num_labels": 1, **overrides})


@torch.no_grad()
def wanted(model: Any, ids: list[int]) -> np.ndarray:
    """Each sequence alone: transformers looks for padding only where there are several."""
    return model(torch.tensor([ids])).logits[0].float().numpy()


def scores(replica: Any, prompts: dict[str, list[int]] = PROMPTS) -> dict[str, np.ndarray]:
    requests = [classify_request(rid, np.array(ids, np.int32)) for rid, ids in prompts.items()]
    replica.submit(requests)
    outputs = drain(replica)
    for output in outputs.values():
        assert output.finish.type == "length" and output.finish.length == 0, output.finish
        assert len(output.token_ids) == 0
        assert output.scores.dtype == np.float32
    return {rid: output.scores for rid, output in outputs.items()}


def assert_scores(model: Any, found: dict[str, np.ndarray]) -> None:
    assert found.keys() == PROMPTS.keys()
    for rid, ids in PROMPTS.items():
        np.testing.assert_allclose(found[rid], wanted(model, ids), atol=TOLERANCE, err_msg=rid)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = FAMILIES[name]
    model = write(tmp_path, family, **overrides)
    with make_replica(tmp_path) as replica:
        assert replica.state().num_labels == overrides["num_labels"]
        assert_scores(model, scores(replica))


def test_every_family_has_its_classifier() -> None:
    # Of GLM-4 with experts transformers has none.
    assert len(CLASSIFIERS) == len(ARCHITECTURES) - 1 == len({f for f, _ in FAMILIES.values()})


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_scores_do_not_depend_on_how_it_was_scheduled(
    overlap: bool, prefix_cache: bool, tmp_path: Path
) -> None:
    model = write(tmp_path, num_labels=3)
    small = {"max_chunk_tokens": 16, "max_step_tokens": 24, "max_running": 2}
    with make_replica(
        tmp_path, overlap=overlap, prefix_cache=prefix_cache, num_pages=20, **small
    ) as replica:
        assert_scores(model, scores(replica))
        assert_scores(model, scores(replica))
        state = replica.state()
        assert (state.num_cached_tokens > 0) is prefix_cache
        assert state.num_output_tokens == 0


def test_a_reward_model_is_updated_in_place(tmp_path: Path) -> None:
    write(tmp_path)
    new = tiny_hf("llama", seed=7, classifier=True, num_labels=1)
    with make_replica(tmp_path) as replica:
        before = scores(replica)
        push(new, version=1, replica=replica)
        after = scores(replica)
        assert_scores(new, after)
        assert any(abs(before[rid] - after[rid]).max() > 0.01 for rid in PROMPTS)


def test_a_prompt_may_fill_the_whole_context(tmp_path: Path) -> None:
    model = write(tmp_path)
    ids = [int(i) % 90 + 5 for i in range(128)]
    with make_replica(tmp_path) as replica:
        found = scores(replica, {"full": ids})
        np.testing.assert_allclose(found["full"], wanted(model, ids), atol=TOLERANCE)
        replica.submit([classify_request("over", np.array([*ids, 5], np.int32))])
        assert drain(replica)["over"].finish.error == "ContextTooLong"


@pytest.mark.parametrize("mode", ["keep", "retract"])
def test_a_pause_in_the_middle_of_a_prompt_changes_no_score(mode: str, tmp_path: Path) -> None:
    model = write(tmp_path)
    with make_replica(tmp_path, max_chunk_tokens=16, max_step_tokens=16) as replica:
        replica.submit([classify_request(r, np.array(i, np.int32)) for r, i in PROMPTS.items()])
        replica.step()
        replica.send(Pause(mode=mode))
        replica.send(Resume())
        assert_scores(model, {rid: out.scores for rid, out in drain(replica).items()})


def test_a_score_of_new_weights_over_old_kv_says_so(tmp_path: Path) -> None:
    write(tmp_path)
    new = tiny_hf("llama", seed=7, classifier=True, num_labels=1)
    with make_replica(tmp_path, max_chunk_tokens=16, max_step_tokens=16) as replica:
        keep = classify_request("keep", np.array(PROMPT, np.int32))
        replica.submit([keep])
        replica.step()
        push(new, version=1, replica=replica)
        spans = drain(replica)["keep"].kv_spans
        assert [(span.version, span.start, span.end) for span in spans] == [(0, 0, 16), (1, 16, 55)]


def test_scores_in_bfloat16_are_not_rounded_to_it(tmp_path: Path) -> None:
    write(tmp_path, dtype=torch.bfloat16)
    with make_replica(tmp_path, dtype="bfloat16") as replica:
        found = np.concatenate(list(scores(replica).values()))
    assert (torch.from_numpy(found).bfloat16().float().numpy() != found).any()


def test_what_a_model_cannot_do_is_refused_for_that_request_alone(tmp_path: Path) -> None:
    write(tmp_path / "classifier")
    write_tiny(tmp_path / "causal")
    good = {"classifier": classify_request("good", np.array([5, 6], np.int32))}
    bad = {"causal": classify_request("bad", np.array([5, 6], np.int32))}
    good["causal"], bad["classifier"] = request("good", [5, 6]), request("bad", [5, 6])
    for kind in ("classifier", "causal"):
        with make_replica(tmp_path / kind) as replica:
            replica.submit([bad[kind], good[kind]])
            outputs = drain(replica)
        assert outputs["bad"].finish.error == "InvalidRequest"
        assert "task" in outputs["bad"].finish.message
        assert outputs["good"].finish.type == "length"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ranks_score_as_one(family: str, tmp_path: Path) -> None:
    model = write(tmp_path, family, num_labels=3)
    config = EngineConfig(
        model=str(tmp_path),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=100, page_size=8),
        scheduler=SchedulerConfig(max_running=8, max_step_tokens=64, max_chunk_tokens=24),
        parallel=ParallelConfig(tp_size=2),
    )
    executor = ThreadedExecutor(config)
    with InlineReplica(config, executor) as replica:
        assert_scores(model, scores(replica))
    for results in executor.all_results:
        first, second = (result.scores for result in results)
        assert (first is None and second is None) or first.tobytes() == second.tobytes()


@pytest.mark.parametrize("wrong", ["missing", "shape", "unknown"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(wrong: str, tmp_path: Path) -> None:
    model = write(tmp_path, num_labels=3)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "score.weight"
    if wrong == "missing":
        del tensors[name]
    elif wrong == "shape":
        tensors[name] = tensors[name][:2].clone()
    else:
        name = "lm_head.weight"
        tensors[name] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ManifestMismatch) as caught:
        make_replica(tmp_path)
    assert caught.value.field == name
