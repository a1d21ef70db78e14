"""DeepSpeed and FSDP2 sources on two ranks: what they say is the plain model, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.protocol import TensorSpec
from tests.helpers import sharded_models as models
from tests.helpers.rank_processes import run_ranks
from tests.helpers.source_ranks import deepspeed_sources, fsdp_sources
from trainer_bridge.adapters.base import spec_of
from trainer_bridge.adapters.bucketing import even_share, in_buckets
from trainer_bridge.adapters.fitting import source_of
from trainer_bridge.adapters.plain import PlainSource

SIZE = 2


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("deepspeed", exc_type=ImportError)
    return run_ranks(deepspeed_sources, SIZE, tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(fsdp_sources, SIZE, tmp_path_factory.mktemp("fsdp"))


def plain(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: p.detach().to(dtype) for name, p in models.model().named_parameters()}


def from_shards(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Full tensors put together from the pieces of all ranks, each element exactly once."""
    flats: dict[str, torch.Tensor] = {}
    times: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for piece, flat in (pair for rank in ranks for pair in rank["shards"]):
        numel = torch.Size(piece.shape).numel()
        flats.setdefault(piece.name, torch.empty(numel, dtype=flat.dtype))
        times.setdefault(piece.name, torch.zeros(numel, dtype=torch.int64))
        flats[piece.name][piece.start : piece.stop] = flat
        times[piece.name][piece.start : piece.stop] += 1
        shapes[piece.name] = piece.shape
    assert all(bool((count == 1).all()) for count in times.values())
    return {name: flat.reshape(shapes[name]) for name, flat in flats.items()}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def check(ranks: list[dict[str, Any]], key: str, want: dict[str, torch.Tensor]) -> None:
    """Tensors of every rank, the pieces of all, and the announcement describe `want`."""
    said = [rank[key] for rank in ranks]
    for rank in said:
        assert_equal(dict(rank["tensors"]), want)
        assert rank["specs"] == [
            TensorSpec(name, str(t.dtype).removeprefix("torch."), list(t.shape))
            for name, t in rank["tensors"]
        ]
    assert_equal(from_shards(said), want)
    bytes_of = [sum(flat.nbytes for _, flat in rank["shards"]) for rank in said]
    assert max(bytes_of) < 0.6 * sum(bytes_of), "each rank sends its own part"


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_zero_is_the_plain_model(deepspeed: list[dict[str, Any]], stage: int) -> None:
    check(deepspeed, f"zero{stage}", plain())
    assert deepspeed[0][f"zero{stage}"]["lasting"] == (stage < 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_zero_after_a_step_has_the_new_weights(deepspeed: list[Any], stage: int) -> None:
    trained = dict(deepspeed[0][f"zero{stage}-trained"]["tensors"])
    check(deepspeed, f"zero{stage}-trained", trained)
    assert not any(torch.equal(trained[name], tensor) for name, tensor in plain().items())
    for name, tensor in dict(deepspeed[0]["zero0-trained"]["tensors"]).items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_zero3_rounds_to_the_dtype_of_the_wire(deepspeed: list[dict[str, Any]]) -> None:
    check(deepspeed, "zero3-bfloat16", plain(torch.bfloat16))


@pytest.mark.slow
def test_zero3_gathers_a_bucket_at_a_time(deepspeed: list[dict[str, Any]]) -> None:
    total = sum(tensor.nbytes for tensor in plain().values())
    persistent = sum(t.nbytes for t in plain().values() if t.numel() < 100)
    most = deepspeed[0]["zero3-gathered"]
    assert 0 < most <= models.BUCKET_BYTES + persistent < total / 2


@pytest.mark.slow
def test_fsdp_is_the_plain_model(fsdp: list[dict[str, Any]]) -> None:
    check(fsdp, "fsdp", plain())
    assert not fsdp[0]["fsdp"]["lasting"]


@pytest.mark.slow
def test_fsdp_after_a_step_has_the_new_weights(fsdp: list[dict[str, Any]]) -> None:
    trained = dict(fsdp[0]["fsdp-trained"]["tensors"])
    check(fsdp, "fsdp-trained", trained)
    assert not any(torch.equal(trained[name], tensor) for name, tensor in plain().items())
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in trained.items()}
    check(fsdp, "fsdp-bfloat16", rounded)


@pytest.mark.slow
def test_of_replicas_only_one_sends(fsdp: list[dict[str, Any]]) -> None:
    assert_equal(from_shards([rank["fsdp-replicas"] for rank in fsdp]), plain())
    assert fsdp[1]["fsdp-replicas"]["shards"] == []


@pytest.mark.slow
def test_fsdp_gathers_a_bucket_at_a_time(fsdp: list[dict[str, Any]]) -> None:
    total = sum(tensor.nbytes for tensor in plain().values())
    largest = max(tensor.nbytes for tensor in plain().values())
    assert 0 < fsdp[0]["fsdp-alive"] <= models.BUCKET_BYTES + largest < total / 2


@pytest.mark.slow
def test_columns_are_refused_by_name(fsdp: list[dict[str, Any]]) -> None:
    assert fsdp[0]["columns"].startswith("weight: weight is sharded as")


def test_a_plain_module_is_a_plain_source_also_where_it_is_converted() -> None:
    module = models.model()
    for dtype in (None, torch.float32, torch.bfloat16):
        source = source_of(module, dtype=dtype)
        assert isinstance(source, PlainSource)
        assert source.lasting == (dtype is not torch.bfloat16)
        want = plain(dtype or torch.float32)
        assert_equal(dict(source.tensors()), want)
        assert source.specs() == [spec_of(name, tensor) for name, tensor in want.items()]


def test_ranks_that_hold_a_module_whole_send_its_elements_once_and_as_they_are_announced() -> None:
    sources = [
        PlainSource(models.model(), dtype=torch.bfloat16, rank=rank, world_size=3)
        for rank in range(3)
    ]
    flats = {spec.name: torch.empty(spec.shape).flatten().bfloat16() for spec in sources[0].specs()}
    for source in sources:
        for piece, run in source.shards():
            assert piece.dtype == "bfloat16"
            flats[piece.name][piece.start : piece.stop] = run
    want = plain(torch.bfloat16)
    assert_equal({name: flat.view_as(want[name]) for name, flat in flats.items()}, want)


def test_buckets_keep_the_order_and_the_limit() -> None:
    sizes = [3, 4, 9, 1, 1, 5, 2]
    buckets = list(in_buckets(sizes, lambda size: size, 7))
    assert buckets == [[3, 4], [9], [1, 1, 5], [2]]
    assert list(in_buckets([], lambda size: size, 7)) == []


def test_even_shares_cover_everything_once() -> None:
    for numel in (0, 1, 5, 8):
        shares = [even_share(numel, rank, 3) for rank in range(3)]
        assert [i for start, stop in shares for i in range(start, stop)] == list(range(numel))
