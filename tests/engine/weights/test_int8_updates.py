"""Weights stored as int8: an update leaves what a fresh load would, however it comes and fails."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from engine.errors import CheckpointError, ChecksumMismatch, ManifestMismatch, NonFiniteWeights
from engine.protocol import BeginUpdate, CheckWeights, GetWeight, TensorPiece
from engine.quant.int8 import Int8
from engine.weights.checksum import checksum
from engine.weights.initial import load_initial
from engine.weights.service import WeightService
from kernels.quant.rows import quantize_rows
from tests.helpers.weight_engines import (
    VERSION,
    Tensors,
    fresh,
    make_rank,
    pieces,
    specs,
    split,
    storages,
)
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.stored import check_stored, stored_checksums

INT8 = Int8("torch")
QUERY = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"


def make(tp_rank: int = 0, tp_size: int = 1, **service: object) -> tuple[object, WeightService]:
    return make_rank(tp_rank, tp_size, dtype=torch.bfloat16, linear=INT8, **service)


def drawn(model: object, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """New weights in `dtype`, as a trainer of bfloat16 has them."""
    return {name: t.bfloat16().to(dtype) for name, t in fresh(model, seed).items()}


def loaded(new: Tensors, tp_rank: int = 0, tp_size: int = 1) -> Tensors:
    """What an engine stores that loads `new` when it starts."""
    model, rank = make(tp_rank, tp_size)
    load_initial(rank.session.catalog, new.items())
    return storages(model)


def assert_equal(found: Tensors, want: Tensors) -> None:
    assert found.keys() == want.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, want[name]), name


def assert_loaded(model: object, new: Tensors, tp_rank: int = 0, tp_size: int = 1) -> None:
    assert_equal(storages(model), loaded(new, tp_rank, tp_size))


def send_whole(rank: WeightService, new: Tensors) -> None:
    rank.session.receive(new.items())


def send_lent(rank: WeightService, new: Tensors) -> None:
    rank.session.receive(new.items(), lasting=True)


def send_shuffled(rank: WeightService, new: Tensors) -> None:
    """Buckets of any size, in any order."""
    draw = random.Random(3)
    named = list(new.items())
    draw.shuffle(named)
    while named:
        size = draw.randint(1, 5)
        bucket, named = dict(named[:size]), named[size:]
        with rank.session.receiving(pieces(bucket)):
            arrived = zip(pieces(bucket), (t.reshape(-1) for t in bucket.values()), strict=True)
            rank.session.feed(arrived, lasting=False)


def send_cut(rank: WeightService, new: Tensors) -> None:
    """Flat parts of every tensor, whose rows the cuts go through."""
    arrived = [piece for share in split(new, 3) for piece in share if piece[1].numel()]
    random.Random(4).shuffle(arrived)
    for first in range(0, len(arrived), 7):
        some = arrived[first : first + 7]
        with rank.session.receiving([piece for piece, _ in some]):
            rank.session.feed(some, lasting=False)


SENDERS: dict[str, Callable[[WeightService, Tensors], None]] = {
    "whole": send_whole,
    "lent": send_lent,
    "shuffled": send_shuffled,
    "cut": send_cut,
}


def test_linear_weights_alone_are_int8() -> None:
    model, _ = make()
    dtypes = {name: tensor.dtype for name, tensor in storages(model).items()}
    assert dtypes["model.layers.0.self_attn.qkv_proj.weight"] == torch.int8
    assert dtypes["model.layers.0.self_attn.qkv_proj.weight_scale"] == torch.float32
    assert dtypes[NORM] == dtypes["model.embed_tokens.weight"] == torch.bfloat16
    eights = [name for name, dtype in dtypes.items() if dtype == torch.int8]
    assert len(eights) == 2 * 4


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_hold_slices_of_what_one_rank_holds(tp_size: int) -> None:
    """Those that divide a row's inputs too: the scale is of the whole row."""
    new = drawn(make()[0])
    for tp_rank in range(tp_size):
        model, rank = make(tp_rank, tp_size)
        load_initial(rank.session.catalog, new.items())
        for name in (QUERY, DOWN):
            parameter, key = model.weight_index()[name]
            quantized, scale = parameter.views(key)
            whole = quantize_rows(new[name], backend="torch")
            (piece,) = parameter.parts[key].pieces
            assert torch.equal(quantized, whole[0][piece.source])
            assert torch.equal(scale, whole[1][piece.source[0]])


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_an_update_leaves_the_bits_of_a_fresh_load(mode: str, sender: str, tp_size: int) -> None:
    for tp_rank in range(tp_size):
        model, rank = make(tp_rank, tp_size)
        pointers = [p.data_ptr() for p in model.parameters()]
        new = drawn(model)
        manifest = specs(new)
        rank.handle(BeginUpdate(version=4, manifest=manifest, mode=mode))
        SENDERS[sender](rank, new)
        report = rank.session.commit(4)
        assert_loaded(model, new, tp_rank, tp_size)
        assert [p.data_ptr() for p in model.parameters()] == pointers
        stored = sum(t.nbytes for t in storages(model).values())
        # A scale of a rank's slice of a row is written with it, once a tensor.
        assert report.num_bytes == stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_on_the_wire_does_not_show(dtype: torch.dtype) -> None:
    model, rank = make()
    new = drawn(model)
    rank.handle(BeginUpdate(version=4))
    rank.session.receive({name: t.to(dtype) for name, t in new.items()}.items())
    rank.session.commit(4)
    assert_loaded(model, new)


@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("mode", ["shadow", "undo"])
def test_an_update_that_is_aborted_changed_no_bit(mode: str, sender: str) -> None:
    model, rank = make()
    before = storages(model)
    rank.handle(BeginUpdate(version=4, mode=mode))
    SENDERS[sender](rank, drawn(model))
    rank.session.abort(4)
    assert_equal(storages(model), before)
    rank.session.require_servable()
    assert rank.session.version == VERSION


def spoil(new: Tensors, how: str) -> Tensors:
    changed = {
        "integer": lambda t: t.to(torch.int32),
        "shape": lambda t: t[:-1],
        "transposed": lambda t: t.reshape(t.shape[1], t.shape[0]),
    }[how]
    return {name: changed(t) if name == DOWN else t for name, t in new.items()}


@pytest.mark.parametrize("how", ["integer", "shape", "transposed"])
@pytest.mark.parametrize("lasting", [True, False])
def test_what_cannot_be_encoded_is_named(how: str, lasting: bool) -> None:
    model, rank = make()
    before = storages(model)
    rank.handle(BeginUpdate(version=4, mode="undo"))
    with pytest.raises(ManifestMismatch) as refusal:
        rank.session.receive(spoil(drawn(model), how).items(), lasting=lasting)
    assert refusal.value.field == DOWN and DOWN in str(refusal.value)
    rank.session.abort(4)
    assert_equal(storages(model), before)


SCALE = DOWN + "_scale"


def encoded(model: object, new: Tensors) -> Tensors:
    """The same weights as a trainer sends them that quantises itself: scales first."""
    scales, weights = {}, {}
    for name, tensor in new.items():
        parameter, _ = model.weight_index()[name]
        if parameter.dtype != torch.int8:
            weights[name] = tensor
            continue
        weights[name], scale = quantize_rows(tensor, backend="torch")
        scales[f"{name}_scale"] = scale[:, None]
    return {**scales, **weights}


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_what_is_encoded_already_is_stored_bit_for_bit(
    mode: str, sender: str, tp_size: int
) -> None:
    """In any order of the halves, in any buckets and cuts."""
    for tp_rank in range(tp_size):
        model, rank = make(tp_rank, tp_size)
        new = drawn(model)
        sent = encoded(model, new)
        rank.handle(BeginUpdate(version=4, manifest=specs_with_sums(sent), mode=mode))
        SENDERS[sender](rank, sent)
        assert rank.session.commit(4).num_tensors == len(new)
        assert_loaded(model, new, tp_rank, tp_size)


def test_a_fresh_load_takes_what_is_encoded_already() -> None:
    model, rank = make()
    new = drawn(model)
    load_initial(rank.session.catalog, encoded(model, new).items())
    assert_loaded(model, new)


def without(new: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in new.items() if name not in names}


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_half_of_an_encoded_tensor_is_refused_by_the_name_of_the_other(
    mode: str, announced: bool
) -> None:
    model, rank = make()
    before, new = storages(model), drawn(model)
    whole = encoded(model, new)
    for sent, missing in (
        (without(whole, SCALE), SCALE),
        (without(whole, DOWN), DOWN),
        ({**whole, DOWN: new[DOWN]}, SCALE),
    ):
        with pytest.raises(ManifestMismatch) as refusal:
            if announced:
                rank.handle(BeginUpdate(version=4, manifest=specs(sent), mode=mode))
            else:
                rank.handle(BeginUpdate(version=4, mode=mode))
                rank.session.receive(sent.items())
                rank.session.commit(4)
        assert refusal.value.field == missing
        rank.session.abort(4)
        if mode != "in_place":
            assert_equal(storages(model), before)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (SCALE, torch.ones(16)),
        (SCALE, torch.ones(1, 16)),
        (SCALE, torch.ones(16, 1, dtype=torch.int8)),
        (NORM, torch.ones(16, dtype=torch.int8)),
        (f"{NORM}_scale", torch.ones(1)),
        (DOWN, torch.ones(16, 24, dtype=torch.uint8)),
    ],
    ids=["flat", "row", "integers", "norm", "of norm", "unsigned"],
)
def test_a_half_of_another_kind_is_named(name: str, tensor: torch.Tensor) -> None:
    _, rank = make()
    rank.handle(BeginUpdate(version=4, mode="in_place"))
    with pytest.raises(ManifestMismatch) as refusal:
        rank.session.receive([(name, tensor)])
    assert refusal.value.field == name


def test_integers_are_refused_where_weights_are_floats() -> None:
    model, rank = make_rank()
    rank.handle(BeginUpdate(version=4))
    with pytest.raises(ManifestMismatch, match="int8, not a float") as refusal:
        rank.session.receive([(DOWN, fresh(model)[DOWN].to(torch.int8))])
    assert refusal.value.field == DOWN


def test_scales_that_are_not_finite_are_refused() -> None:
    for mode in ("shadow", "in_place"):
        model, rank = make()
        sent = encoded(model, drawn(model))
        sent[SCALE][3] = float("nan")
        rank.handle(BeginUpdate(version=4, mode=mode))
        rank.session.receive(sent.items())
        with pytest.raises(NonFiniteWeights) as refusal:
            rank.session.commit(4)
        assert refusal.value.field in (SCALE, DOWN)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_what_is_not_finite_is_refused_as_it_came(mode: str, sums: bool, value: float) -> None:
    """In int8 nothing of it would be left to see."""
    model, rank = make()
    before = storages(model)
    new = drawn(model)
    new[DOWN][3, 5] = value
    manifest = specs_with_sums(new) if sums else specs(new)
    rank.handle(BeginUpdate(version=4, manifest=manifest, mode=mode))
    rank.session.receive(new.items())
    with pytest.raises(NonFiniteWeights) as refusal:
        rank.session.commit(4)
    assert refusal.value.field == DOWN
    rank.session.abort(4)
    if mode == "in_place":
        assert "mixture" in rank.session.refusal
    else:
        assert_equal(storages(model), before)


def specs_with_sums(new: Tensors) -> list:
    return [type(s)(s.name, s.dtype, s.shape, checksum(new[s.name])) for s in specs(new)]


def test_a_checkpoint_with_nan_is_refused() -> None:
    model, rank = make()
    new = drawn(model)
    new[QUERY][0, 0] = float("nan")
    with pytest.raises(CheckpointError) as refusal:
        load_initial(rank.session.catalog, new.items())
    assert refusal.value.field == QUERY


def test_bits_that_are_not_those_announced_are_refused() -> None:
    model, rank = make()
    before, new = storages(model), drawn(model)
    manifest = specs_with_sums(new)
    new[DOWN][0, 0] += 1
    rank.handle(BeginUpdate(version=4, manifest=manifest, mode="undo"))
    rank.session.receive(new.items())
    with pytest.raises(ChecksumMismatch) as refusal:
        rank.session.commit(4)
    assert refusal.value.field == DOWN
    rank.session.abort(4)
    assert_equal(storages(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_trainer_computes_the_sums_of_what_is_stored(tp_size: int, dtype: torch.dtype) -> None:
    new = drawn(make()[0], dtype=dtype)
    for tp_rank in range(tp_size):
        model, rank = make(tp_rank, tp_size)
        rank.handle(BeginUpdate(version=4))
        rank.session.receive(new.items())
        rank.session.commit(4)
        (layout,) = rank.handle(CheckWeights(action="layout")).weights
        (held,) = rank.handle(CheckWeights()).weights
        assert stored_checksums(new.items(), layout.layout) == held.checksums
        with torch.no_grad():
            parameter, _ = model.weight_index()[DOWN]
            parameter.companions[0][2] *= 2
        (now,) = rank.handle(CheckWeights()).weights
        assert [n for n, s in now.checksums.items() if s != held.checksums[n]] == [DOWN]


class Trainer(torch.nn.Module):
    """Parameters by full names."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.held = tensors

    def named_parameters(self, *_: object, **__: object):  # type: ignore[no-untyped-def]
        return iter([(n, torch.nn.Parameter(t, requires_grad=False)) for n, t in self.held.items()])


class Target:
    """A rank as what a publisher sends to."""

    def __init__(self, rank: WeightService) -> None:
        self.send = rank.handle


def test_a_push_is_verified_end_to_end() -> None:
    model, rank = make()
    new = drawn(model)
    rank.handle(BeginUpdate(version=4))
    rank.session.receive(new.items())
    rank.session.commit(4)
    check_stored(PlainSource(Trainer(new)), Target(rank))
    new[QUERY][1, 1] += 4
    with pytest.raises(ChecksumMismatch) as refusal:
        check_stored(PlainSource(Trainer(new)), Target(rank))
    assert refusal.value.field == QUERY


def test_values_come_back_dequantised() -> None:
    model, rank = make()
    new = drawn(model)
    load_initial(rank.session.catalog, new.items())
    (report,) = rank.handle(GetWeight(name=DOWN, count=30)).weights
    quantized, scale = quantize_rows(new[DOWN], backend="torch")
    want = (quantized.float() * scale[:, None]).reshape(-1)[:30]
    assert report.values == want.tolist()


def test_noise_shows_and_a_whole_update_heals_it() -> None:
    model, rank = make()
    rank.handle(CheckWeights(action="snapshot"))
    assert rank.handle(CheckWeights(action="compare")).weights[0].differing == []
    rank.handle(CheckWeights(action="reset_tensors"))
    differing = rank.handle(CheckWeights(action="compare")).weights[0].differing
    assert {QUERY, DOWN, NORM} <= set(differing)
    new = drawn(model)
    rank.handle(BeginUpdate(version=4))
    rank.session.receive(new.items())
    rank.session.commit(4)
    assert_loaded(model, new)
    rank.session.require_servable()


def test_an_undo_copy_is_of_what_is_stored_and_a_shadow_of_what_comes() -> None:
    from engine.weights.modes import shadow_bytes, undo_size

    model, rank = make()
    begin = BeginUpdate(version=4)
    held = sum(t.nbytes for t in storages(model).values())
    num_bytes, num_views = undo_size(begin, rank.session.catalog)
    assert num_bytes == held
    assert num_views == len(model.weight_index()) + sum(
        len(p.companions) for p, _ in model.weight_index().values()
    )
    full = sum(t.numel() for t in drawn(model).values())
    assert shadow_bytes(begin, rank.session.catalog) == 2 * full


def test_pieces_need_not_be_of_whole_rows() -> None:
    """Halves of one matrix, the second first, in a partial update."""
    model, rank = make()
    new = drawn(model)
    flat = new[DOWN].reshape(-1)
    shape, cut = list(new[DOWN].shape), 37
    halves = [
        TensorPiece(DOWN, "bfloat16", shape, cut, len(flat)),
        TensorPiece(DOWN, "bfloat16", shape, 0, cut),
    ]
    rank.handle(BeginUpdate(version=4, partial=True, mode="in_place"))
    for half in halves:
        with rank.session.receiving([half]):
            rank.session.feed([(half, flat[half.start : half.stop])], lasting=False)
    rank.session.commit(4)
    parameter, key = model.weight_index()[DOWN]
    for view, want in zip(
        parameter.views(key), quantize_rows(new[DOWN], backend="torch"), strict=True
    ):
        assert torch.equal(view, want)
