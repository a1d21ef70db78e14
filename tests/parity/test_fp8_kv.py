"""fp8 KV through the whole engine: against a dense model whose keys and values went through the
codec, whatever the batch; how much memory it takes; and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CacheConfig, EngineConfig, SpeculativeConfig
from engine.errors import UnsupportedOption
from engine.layers.attention import ProjectedHeads
from engine.models.decoder import CausalLM
from engine.option_checks import check_kv_dtype
from engine.protocol import RequestOutput
from kernels.quant.fp8_kv import decode, encode
from rollout.launch import launch
from tests.helpers.dense_context import DenseContext
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.load_tiny import load_path
from tests.helpers.tiny_models import write_tiny
from trainer_bridge import push

PROMPTS = [[5 + (7 * i + j * j) % 90 for j in range(40 + 9 * i)] for i in range(4)]
NEW = 12
FP8: dict[str, Any] = {"kv_dtype": "fp8_e4m3"}


@pytest.fixture(scope="module", params=["qwen3", "gemma3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen3: norms of heads. gemma3: layers with a window."""
    folder = tmp_path_factory.mktemp(f"fp8-kv-{request.param}")
    write_tiny(folder, request.param)
    return folder


class StoredContext(DenseContext):
    """Keys and values as they are read back from fp8 pages; `through_codec` False: as they are."""

    through_codec = True

    def attend(self, layer_index: int, heads: ProjectedHeads) -> torch.Tensor:
        """See `DenseContext`."""
        q, k, v = heads.rotated()
        if self.through_codec:
            k, v = (decode(*encode(x), x.dtype) for x in (k, v))
        return super().attend(layer_index, SimpleNamespace(rotated=lambda: (q, k, v)))


@torch.inference_mode()
def dense_logprobs(
    model: CausalLM, prompt: Sequence[int], output: Sequence[int], *, through_codec: bool
) -> np.ndarray:
    """Of every output token, in one pass over the whole sequence."""
    ids = torch.tensor([*prompt, *output])
    context = StoredContext(model.config.layers, len(ids))
    context.through_codec = through_codec
    logits = model.compute_logits(model(ids, context))[len(prompt) - 1 : -1].float()
    chosen = torch.tensor(list(output)).unsqueeze(1)
    return logits.log_softmax(-1).gather(1, chosen).squeeze(1).numpy()


def asked(index: int, rid: str = "", **options):
    return request(rid or str(index), PROMPTS[index], max_new_tokens=NEW, seed=index, **options)


def runs(folder: Path) -> dict[str, dict[str, RequestOutput]]:
    """The same requests alone, together, in small chunks, and behind a cached prefix."""
    every = range(len(PROMPTS))
    found: dict[str, dict[str, RequestOutput]] = {"alone": {}}
    with make_replica(folder, prefix_cache=False, **FP8) as replica:
        for index in every:
            replica.submit([asked(index)])
            found["alone"].update(drain(replica))
        replica.submit([asked(index) for index in every])
        found["together"] = drain(replica)
    with make_replica(folder, max_chunk_tokens=7, max_step_tokens=16, **FP8) as replica:
        replica.submit([asked(index) for index in every])
        found["chunks"] = drain(replica)
        replica.submit([asked(index) for index in every])
        found["prefix hit"] = drain(replica)
    assert all(o.cached_tokens > 0 for o in found["prefix hit"].values())
    return found


def mean_difference(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    return float(np.abs(np.concatenate(left) - np.concatenate(right)).mean())


def test_logprobs_are_those_of_stored_keys_and_values_whatever_the_batch(tiny: Path) -> None:
    """A sum in another order may round one number in some thousands to the next code; so means are
    compared, with what the codec itself shifts."""
    model = load_path(tiny)
    found = runs(tiny)
    exact, stored = (
        [
            dense_logprobs(
                model, prompt, found["alone"][str(i)].token_ids.tolist(), through_codec=codec
            )
            for i, prompt in enumerate(PROMPTS)
        ]
        for codec in (False, True)
    )
    shift = mean_difference(stored, exact)
    assert shift > 1e-3, "the codec would have gone unnoticed"
    for name, outputs in found.items():
        got = [outputs[str(i)].logprobs for i in range(len(PROMPTS))]
        for i, output in outputs.items():
            assert output.token_ids.tolist() == found["alone"][i].token_ids.tolist(), name
        assert mean_difference(got, stored) < 0.1 * shift, name


@pytest.mark.gpu
def test_a_gpu_gives_the_logprobs_of_the_cpu(tiny: Path) -> None:
    """Triton against torch, each in float32."""
    outputs = []
    for options in ({}, {"device": "cuda"}, {"device": "cuda", "cuda_graphs": False}):
        with make_replica(tiny, **FP8, **options) as replica:
            replica.submit([asked(index) for index in range(len(PROMPTS))])
            outputs.append(drain(replica))
    want, *others = outputs
    for got in others:
        for rid, output in want.items():
            assert got[rid].token_ids.tolist() == output.token_ids.tolist()
        pairs = [(got[rid].logprobs, output.logprobs) for rid, output in want.items()]
        assert mean_difference(*map(list, zip(*pairs, strict=True))) < 1e-3


def test_an_update_needs_no_new_scales(tmp_path: Path) -> None:
    """Nothing is calibrated: after a push it is as if the new weights had been loaded."""
    write_tiny(tmp_path / "old", "qwen2")
    new = write_tiny(tmp_path / "new", "qwen2", seed=1)
    with make_replica(tmp_path / "old", **FP8) as replica:
        replica.submit([asked(0)])
        drain(replica)
        push(new, 1, replica)
        replica.submit([asked(0)])
        updated = drain(replica)["0"]
    with make_replica(tmp_path / "new", **FP8) as replica:
        replica.submit([asked(0)])
        loaded = drain(replica)["0"]
    assert updated.token_ids.tolist() == loaded.token_ids.tolist()
    np.testing.assert_array_equal(updated.logprobs, loaded.logprobs)


def test_drafts_change_nothing(tmp_path: Path) -> None:
    write_tiny(tmp_path, "qwen2")
    outputs = []
    for speculative in (SpeculativeConfig(), SpeculativeConfig(method="ngram")):
        config = EngineConfig(
            model=str(tmp_path),
            dtype="float32",
            device="cpu",
            cache=CacheConfig(num_pages=200, page_size=8, kv_dtype="fp8_e4m3"),
            speculative=speculative,
        )
        with launch(config) as replica:
            replica.submit([asked(i, temperature=0.0) for i in range(len(PROMPTS))])
            outputs.append(drain(replica))
    plain, drafted = outputs
    for rid, output in plain.items():
        assert drafted[rid].token_ids.tolist() == output.token_ids.tolist()


def test_the_same_memory_holds_more_pages(tmp_path: Path) -> None:
    """Heads of 16: 16 codes and 2 bytes of scale in place of 16 x 4 bytes of float32."""
    write_tiny(tmp_path, "qwen2")
    pages = {}
    for kv_dtype in ("auto", "fp8_e4m3"):
        config = EngineConfig(
            model=str(tmp_path),
            dtype="float32",
            device="cpu",
            cache=CacheConfig(memory_bytes=1 << 20, page_size=8, kv_dtype=kv_dtype),
        )
        with launch(config) as replica:
            pages[kv_dtype] = replica.state().total_pages
    assert pages["auto"] == (1 << 20) // (8 * 2 * 2 * 2 * 64)
    assert pages["fp8_e4m3"] == (1 << 20) // (8 * 2 * 2 * 2 * 18)


def test_what_is_refused_by_name(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    with pytest.raises(UnsupportedOption, match="float16") as caught:
        make_replica(tmp_path, dtype="float16", **FP8)
    assert caught.value.field == "kv_dtype"
    config = EngineConfig(
        model=str(tmp_path), device="cpu", cache=CacheConfig(kv_scales="checkpoint")
    )
    with pytest.raises(UnsupportedOption, match="'checkpoint' is not built") as caught:
        launch(config)
    assert caught.value.field == "kv_scales"


def test_a_gpu_without_fp8_is_refused() -> None:
    check_kv_dtype("fp8_e4m3", "bfloat16", (8, 9))
    check_kv_dtype("fp8_e4m3", "float32", None)
    check_kv_dtype("auto", "float16", (7, 0))
    with pytest.raises(UnsupportedOption, match=r"8\.9 or more.*8\.0") as caught:
        check_kv_dtype("fp8_e4m3", "bfloat16", (8, 0))
    assert caught.value.field == "kv_dtype"
