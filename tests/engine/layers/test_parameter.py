"""Placing full tensors: in place, checked, and by the right slice on every rank."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.errors import ManifestMismatch, ModelError
from engine.layers.parameter import (
    Shard,
    ShardedParameter,
    even_shard,
    kv_head_shard,
    sliced,
    stacked,
    uneven_shard,
    whole,
)
from engine.parallel.mesh import Mesh


def merged() -> ShardedParameter:
    """Rows 2..4 of `a` [6, 3] above rows 1..2 of `b` [4, 3]."""
    parts = {
        "a": stacked((6, 3), 0, Shard(2, 3)),
        "b": stacked((4, 3), 0, Shard(1, 2), 3),
    }
    return ShardedParameter(torch.full((5, 3), float("nan")), parts)


def test_place_writes_the_slices_and_keeps_the_storage() -> None:
    parameter = merged()
    address = parameter.data_ptr()
    a, b = torch.randn(6, 3), torch.randn(4, 3)
    assert parameter.place(a, "a") == 3 * 3 * 4
    assert parameter.place(b, "b") == 2 * 3 * 4
    assert torch.equal(parameter, torch.cat([a[2:5], b[1:3]]))
    assert parameter.data_ptr() == address


def test_place_converts_the_dtype() -> None:
    parameter = ShardedParameter(torch.empty(4, dtype=torch.bfloat16), whole((4,)))
    full = torch.randn(4, dtype=torch.float64)
    parameter.place(full)
    assert torch.equal(parameter, full.to(torch.bfloat16))


def test_place_takes_a_parameter_that_requires_grad() -> None:
    parameter = ShardedParameter(torch.empty(4), whole((4,)))
    parameter.place(torch.nn.Parameter(torch.ones(4)))
    assert torch.equal(parameter, torch.ones(4))
    assert not parameter.requires_grad


def test_place_slices_along_a_later_dim() -> None:
    parameter = ShardedParameter(torch.empty(2, 3), sliced((2, 6), 1, Shard(3, 3)))
    full = torch.randn(2, 6)
    parameter.place(full)
    assert torch.equal(parameter, full[:, 3:])


def test_a_wrong_shape_names_the_tensor_and_writes_nothing() -> None:
    parameter = merged()
    with pytest.raises(ManifestMismatch, match=r"x\.weight.*\[3, 6\].*\[6, 3\]") as caught:
        parameter.place(torch.zeros(3, 6), "a", name="x.weight")
    assert caught.value.field == "x.weight"
    assert parameter.isnan().all()


def test_an_integer_tensor_is_refused() -> None:
    with pytest.raises(ManifestMismatch, match=r"x\.weight has dtype torch\.int8"):
        merged().place(torch.zeros(6, 3, dtype=torch.int8), "a", name="x.weight")


def test_holds_compares_only_this_ranks_slice() -> None:
    parameter = merged()
    full = torch.randn(6, 3)
    parameter.place(full, "a")
    outside, inside = full.clone(), full.clone()
    outside[0] += 1
    inside[3] += 1
    assert parameter.holds(full, "a")
    assert parameter.holds(outside, "a")
    assert not parameter.holds(inside, "a")


def test_a_deep_copy_has_its_own_storage_and_the_same_parts() -> None:
    parameter = merged()
    twin = copy.deepcopy(parameter)
    twin.place(torch.ones(6, 3), "a")
    assert parameter.isnan().all()
    assert twin.parts == parameter.parts


def test_even_shards_cover_everything_once() -> None:
    shards = [even_shard(12, Mesh(tp_rank=rank, tp_size=4), "x") for rank in range(4)]
    assert [(s.start, s.length) for s in shards] == [(0, 3), (3, 3), (6, 3), (9, 3)]


def test_an_indivisible_size_is_refused() -> None:
    with pytest.raises(ModelError, match="num_attention_heads is 9: 2 ranks"):
        even_shard(9, Mesh(tp_rank=0, tp_size=2), "num_attention_heads")


@pytest.mark.parametrize(
    ("num_kv_heads", "tp_size", "starts"),
    [(8, 2, [0, 4]), (2, 2, [0, 1]), (2, 4, [0, 0, 1, 1]), (1, 4, [0, 0, 0, 0])],
)
def test_kv_heads_are_shared_when_ranks_outnumber_them(
    num_kv_heads: int, tp_size: int, starts: list[int]
) -> None:
    meshes = [Mesh(tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
    shards = [kv_head_shard(num_kv_heads, mesh) for mesh in meshes]
    assert [shard.start for shard in shards] == starts
    assert {shard.length for shard in shards} == {max(1, num_kv_heads // tp_size)}


def test_kv_heads_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ModelError, match="num_key_value_heads"):
        kv_head_shard(3, Mesh(tp_rank=0, tp_size=4))


@pytest.mark.parametrize("size", [1, 5, 63, 100])
def test_uneven_shards_cover_everything_once(size: int) -> None:
    shards = [uneven_shard(size, Mesh(tp_rank=rank, tp_size=4)) for rank in range(4)]
    covered = [i for shard in shards for i in range(shard.start, shard.start + shard.length)]
    assert covered == list(range(size))


def test_a_rank_outside_the_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match="tp_rank 2"):
        Mesh(tp_rank=2, tp_size=2)
