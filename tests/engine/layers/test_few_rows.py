"""A decoder that runs few rows through fused kernels, against the same one that does not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.attention.base import AttentionBatch
from engine.attention.context import ForwardContext
from engine.attention.triton import TritonBackend
from engine.layers.runtime import LayerRuntime
from engine.models.build import build_model
from engine.models.config import read_config
from engine.models.decoder import CausalLM
from engine.parallel.mesh import Mesh
from kernels.testing import triton_device
from tests.helpers.head_pools import head_pool

PAGE_SIZE, CONTEXT = 16, 64
CONFIG = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT,
}
ARCHITECTURES = [
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "LlamaForCausalLM",
    "SmolLM3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
]


def runtime_on(device: str, dtype: torch.dtype, **options: object) -> LayerRuntime:
    return LayerRuntime(device=torch.device(device), dtype=dtype, backend="triton", **options)


def test_who_takes_the_fused_products() -> None:
    assert runtime_on("cpu", torch.bfloat16).few_rows == 16
    assert runtime_on("cpu", torch.float32).few_rows == 0
    assert runtime_on("cpu", torch.bfloat16, mesh=Mesh(tp_rank=1, tp_size=2)).few_rows == 0
    other = SimpleNamespace(fuses_few_rows=False)
    assert runtime_on("cpu", torch.bfloat16, linear=other).few_rows == 0
    plain = LayerRuntime(device=torch.device("cpu"), dtype=torch.bfloat16, backend="torch")
    assert plain.few_rows == 0


@pytest.mark.parametrize("architecture", ["Olmo2ForCausalLM", "Gemma3ForCausalLM"])
def test_families_whose_norms_follow_a_product_take_none(architecture: str) -> None:
    config = read_config({"architectures": [architecture], **CONFIG})
    runtime = runtime_on("cpu", torch.bfloat16)
    assert build_model(config, runtime=runtime).model.few_rows == 0
    plain = read_config({"architectures": ["SmolLM3ForCausalLM"], **CONFIG})
    assert build_model(plain, runtime=runtime).model.few_rows == 16


def random_model(architecture: str) -> CausalLM:
    own = {"no_rope_layers": [1, 0]} if architecture.startswith("SmolLM3") else {}
    config = read_config({"architectures": [architecture], **CONFIG, **own})
    model = build_model(config, runtime=runtime_on(triton_device(), torch.float16))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


class Sequences:
    """Rows of equal length in a page pool, stepped without the engine."""

    def __init__(self, model: CausalLM, rows: int) -> None:
        config = model.config
        device = torch.device(triton_device())
        self.model, self.rows, self.length = model, rows, 0
        columns = CONTEXT // PAGE_SIZE
        self.host_pages = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
        self.pages = torch.from_numpy(self.host_pages).to(device)
        self.pool = head_pool(
            num_layers=config.num_layers,
            num_pages=rows * columns,
            page_size=PAGE_SIZE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=torch.float16,
            device=device,
        )
        self.attention = TritonBackend(self.pool, scale=config.head_dim**-0.5)

    def logits_after(self, ids_RN: torch.Tensor) -> torch.Tensor:
        """Append N tokens to every row; logits of all of them, float32 [R * N, V]."""
        count = ids_RN.shape[1]
        positions_T = (self.length + torch.arange(count)).repeat(self.rows)
        rows_T = torch.arange(self.rows).repeat_interleave(count)
        device = self.pages.device
        positions_T, rows_T = positions_T.to(device), rows_T.to(device)
        slots_T = self.pages[rows_T, positions_T // PAGE_SIZE].long() * PAGE_SIZE
        self.length += count
        starts = np.arange(self.rows + 1, dtype=np.int64) * count
        batch = AttentionBatch(
            query_start_R1=starts,
            kv_lens_R=np.full(self.rows, self.length),
            slots_R=np.arange(self.rows),
            host_pages=self.host_pages,
            page_table=self.pages,
            write_slots_T=slots_T + positions_T % PAGE_SIZE,
            page_size=PAGE_SIZE,
            device=device,
        )
        ids_T = ids_RN.reshape(-1).to(device)
        context = ForwardContext(positions_T, self.attention.prepare(batch))
        with torch.inference_mode():
            return self.model.compute_logits(self.model(ids_T, context))


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_get_the_logits_of_many(architecture: str, rows: int) -> None:
    """Prefill by the separate kernels, then decode by the fused ones and by the separate."""
    model = random_model(architecture)
    ids_RN = torch.randint(0, 90, (rows, 22))
    fused, separate = Sequences(model, rows), Sequences(model, rows)
    for sequences in (fused, separate):
        sequences.logits_after(ids_RN[:, :20])
    for step in (20, 21):
        got = fused.logits_after(ids_RN[:, step : step + 1])
        model.model.few_rows = model.lm_head.few_rows = 0
        want = separate.logits_after(ids_RN[:, step : step + 1])
        model.model.few_rows = model.lm_head.few_rows = 16
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
    for left, right in zip(fused.pool.tensors(), separate.pool.tensors(), strict=True):
        torch.testing.assert_close(left, right, atol=0.02, rtol=0.02)
