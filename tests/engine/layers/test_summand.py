"""A summand of the residual stream whose sum over ranks the next norm closes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.layers.kinds import NormKind
from engine.layers.norm import RMSNorm
from engine.layers.runtime import LayerRuntime
from engine.layers.summand import Partial, whole
from engine.models.build import build_model
from engine.models.locate import locate
from engine.parallel.collectives import NoCollectives, Norm
from engine.parallel.mesh import Mesh
from engine.quant.base import Unquantized
from tests.helpers.dense_context import DenseContext
from tests.helpers.load_tiny import cpu_runtime
from tests.helpers.tiny_models import write_tiny


class Counted(NoCollectives):
    """Stands for two ranks that hold the same: sums are twice what this one has."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append("sum")
        return 2 * x

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append("sum, norm")
        return norm.add(2 * x, residual)


def test_a_norm_closes_the_sum_over_ranks() -> None:
    norm = RMSNorm(8, NormKind(eps=1e-5), runtime=cpu_runtime())
    norm.weight.data.copy_(torch.rand(8))
    x, residual, group = torch.randn(3, 8), torch.randn(3, 8), Counted()
    got = norm.add(Partial(x, group), residual)
    want = norm.add(2 * x, residual)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert group.calls == ["sum, norm"]


def test_whole_sums_what_is_partial_only() -> None:
    x, group = torch.randn(3, 8), Counted()
    assert whole(x) is x
    assert torch.equal(whole(Partial(x, group)), 2 * x)
    assert group.calls == ["sum"]


# The embedding is one sum; each of the two layers has two, after attention and MLP.
@pytest.mark.parametrize(
    "family,calls",
    [
        ("llama", ["sum", *["sum, norm"] * 4]),
        ("olmo2", ["sum", *["sum", "sum", "sum"] * 2]),
        ("gemma3", ["sum"] * 5),
    ],
)
def test_layers_leave_to_the_next_norm_what_it_can_close(
    family: str, calls: list[str], tmp_path: Path
) -> None:
    """OLMo 2 sums the squares of its projections too; its norms come after the sums."""
    write_tiny(tmp_path, family, num_hidden_layers=2)
    group = Counted()
    runtime = replace(cpu_runtime(Mesh(tp_size=2)), collectives=group)
    model = build_model(locate(tmp_path).config, runtime=runtime)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    with torch.inference_mode():
        model(torch.tensor([1, 2, 3]), DenseContext(model.config.layers, 3))
    assert sorted(group.calls) == sorted(calls)


def runtime_of(tp_size: int, dtype: torch.dtype, backend: str) -> LayerRuntime:
    return replace(cpu_runtime(Mesh(tp_size=tp_size), dtype), backend=backend)


def test_ranks_have_the_products_of_few_rows_without_what_surrounds_them() -> None:
    one, two = (runtime_of(size, torch.bfloat16, "triton") for size in (1, 2))
    assert one.few_rows == two.few_rows_apart > 0
    assert one.few_rows_apart == two.few_rows == 0
    for other in (
        runtime_of(2, torch.float32, "triton"),
        runtime_of(2, torch.bfloat16, "torch"),
        replace(two, linear=NoneFused()),
    ):
        assert other.few_rows_apart == 0


class NoneFused(Unquantized):
    fuses_few_rows = False
