"""Publishing weights: in process and by disk, idle and with requests in flight, and refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.errors import InvalidRequest, ManifestMismatch, UpdateOrder, WeightUpdateError
from rollout.launch import launch
from rollout.offline import generate
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge import push
from trainer_bridge.transports import disk

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_tiny(folder, "qwen2", tie_word_embeddings=True)


def logprob_gap(replica, model, rid: str) -> float:
    """Largest difference between the engine's logprobs and those of `model`."""
    replica.submit([request(rid, PROMPT, seed=1)])
    output = drain(replica)[rid]
    want = exact_logprobs(model, PROMPT, output.token_ids)
    return float(np.abs(output.logprobs - want).max())


@pytest.mark.parametrize("transport", ["inproc", "disk"])
def test_the_engine_serves_what_was_pushed(tiny, transport: str, tmp_path) -> None:
    folder, old = tiny
    new = tiny_hf("qwen2", seed=1, tie_word_embeddings=True)
    with make_replica(folder) as replica:
        assert logprob_gap(replica, old, "before") < 1e-4
        report = push(new, 1, replica, transport=transport, folder=tmp_path, measure_memcpy=True)
        assert logprob_gap(replica, new, "after") < 1e-4
        assert replica.state().version == 1
    assert report.num_tensors == len(list(new.parameters()))
    assert report.num_bytes == sum(p.numel() * 4 for p in new.parameters())
    assert report.memcpy_seconds is not None and "ratio" in str(report)
    assert list(tmp_path.iterdir()) == [], "a pushed folder is dropped"


def test_a_bfloat16_engine_rounds_float32_weights(tiny) -> None:
    new = tiny_hf("qwen2", seed=1, tie_word_embeddings=True)
    with make_replica(tiny[0], dtype="bfloat16") as replica:
        report = push(new, 1, replica)
        assert report.num_bytes == sum(p.numel() * 2 for p in new.parameters())
        assert logprob_gap(replica, new, "after") < 0.15


def test_sequences_in_flight_continue_and_show_both_versions(tiny) -> None:
    folder, old = tiny
    new = tiny_hf("qwen2", seed=1, tie_word_embeddings=True)
    with make_replica(folder) as replica:
        replica.submit([request(f"r-{i}", PROMPT, seed=i, max_new_tokens=12) for i in range(4)])
        finals = {}
        for step in range(40):
            if step == 6:
                push(new, 7, replica)
            finals.update({out.rid: out for out in replica.step() if out.finish})
            if replica.idle():
                break
        outputs = list(finals.values())
        assert len(outputs) == 4
        for output in outputs:
            assert output.finish is not None and output.finish.type == "length"
            (first, second) = output.spans
            assert (first.version, second.version) == (0, 7)
            assert (first.start, first.end, second.end) == (0, second.start, 12)
            assert 0 < first.end < 12
            before = exact_logprobs(old, PROMPT, output.token_ids[: first.end])
            np.testing.assert_allclose(output.logprobs[: first.end], before, atol=1e-4)
        # What follows computes its prompt anew: no KV of the old weights is served.
        replica.submit([request("fresh", PROMPT, seed=9)])
        fresh = drain(replica)["fresh"]
        assert fresh.cached_tokens == 0
        want = exact_logprobs(new, PROMPT, fresh.token_ids)
        np.testing.assert_allclose(fresh.logprobs, want, atol=1e-4)


def spoiled(how: str) -> torch.nn.Module:
    if how == "layers":
        return tiny_hf("qwen2", num_hidden_layers=3, tie_word_embeddings=True)
    if how == "missing":
        return tiny_hf("qwen2", num_hidden_layers=1, tie_word_embeddings=True)
    assert how == "shape"
    return tiny_hf("qwen2", intermediate_size=80, tie_word_embeddings=True)


@pytest.mark.parametrize("transport", ["inproc", "disk"])
@pytest.mark.parametrize(
    "how,named",
    [
        ("layers", "model.layers.2."),
        ("missing", "model.layers.1."),
        ("shape", "model.layers.0.mlp."),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name(tiny, how, named, transport) -> None:
    folder, old = tiny
    with make_replica(folder) as replica:
        replica.submit([request("running", PROMPT, seed=3, max_new_tokens=10)])
        replica.step()
        with pytest.raises(ManifestMismatch) as refusal:
            push(spoiled(how), 1, replica, transport=transport)
        assert refusal.value.field.startswith(named)
        output = drain(replica)["running"]
        assert [span.version for span in output.spans] == [0]
        assert logprob_gap(replica, old, "after") < 1e-4
        good = tiny_hf("qwen2", seed=1, tie_word_embeddings=True)
        push(good, 1, replica)
        assert logprob_gap(replica, good, "good") < 1e-4


def test_a_source_that_dies_leaves_the_old_version(tiny) -> None:
    from engine.protocol import BeginUpdate
    from trainer_bridge.adapters.base import spec_of

    folder, old = tiny
    new = tiny_hf("qwen2", seed=1, tie_word_embeddings=True)
    tensors = [(name, p.detach()) for name, p in new.named_parameters()]

    def dies():
        yield from tensors[:5]
        raise ConnectionResetError("the trainer is gone")

    with make_replica(folder) as replica:
        with pytest.raises(ConnectionResetError):
            replica.update_weights_inproc(
                BeginUpdate(version=1, manifest=[spec_of(*named) for named in tensors]), dies()
            )
        assert logprob_gap(replica, old, "old") < 1e-4
        push(new, 1, replica)


def test_versions_only_go_forward(tiny) -> None:
    with make_replica(tiny[0]) as replica:
        push(tiny[1], 5, replica)
        for version in (5, 4):
            with pytest.raises(UpdateOrder, match="5 serves now"):
                push(tiny[1], version, replica)
        assert replica.state().version == 5


def test_a_damaged_file_on_disk_is_refused(tiny, tmp_path) -> None:
    folder, old = tiny
    new = [
        (n, p.detach())
        for n, p in tiny_hf("qwen2", seed=1, tie_word_embeddings=True).named_parameters()
    ]
    path = disk.write(tmp_path / "w", new)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    from engine.errors import SlipstreamError
    from engine.protocol import BeginUpdate

    with make_replica(folder) as replica:
        with pytest.raises(SlipstreamError, match=r"model\.safetensors"):
            disk.load(BeginUpdate(version=1), path, replica)
        assert logprob_gap(replica, old, "old") < 1e-4
        disk.load(BeginUpdate(version=1), disk.write(tmp_path / "w", new), replica)
        assert replica.state().version == 1


@pytest.mark.slow
def test_a_spawned_replica_takes_weights_from_disk(tiny, tmp_path) -> None:
    folder, old = tiny
    new = tiny_hf("qwen2", seed=1, tie_word_embeddings=True)
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", cache=CacheConfig(num_pages=64)
    )
    with launch(config, process=True) as replica:
        (before,) = generate(replica, [request("before", PROMPT, seed=1)])
        np.testing.assert_allclose(
            before.logprobs, exact_logprobs(old, PROMPT, before.token_ids), atol=1e-4
        )
        with pytest.raises((InvalidRequest, WeightUpdateError), match="disk"):
            push(new, 1, replica)
        with pytest.raises(ManifestMismatch, match="layers"):
            push(spoiled("layers"), 1, replica, transport="disk", folder=tmp_path)
        push(new, 1, replica, transport="disk", folder=tmp_path)
        (after,) = generate(replica, [request("after", PROMPT, seed=1)])
        assert [span.version for span in after.spans] == [1]
        np.testing.assert_allclose(
            after.logprobs, exact_logprobs(new, PROMPT, after.token_ids), atol=1e-4
        )
