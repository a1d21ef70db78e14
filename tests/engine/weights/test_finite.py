"""NaN, inf and values that the served dtype cannot hold: refused by name, however they come."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, NonFiniteWeights, WeightUpdateError
from engine.protocol import AbortUpdate, BeginUpdate, CommitUpdate, PrepareUpdate
from engine.weights.checksum import checksum
from engine.weights.finite import find_unfit
from tests.helpers import update_carriers
from tests.helpers.engines import make_replica
from tests.helpers.tiny_models import tiny_hf, write_tiny, write_tiny_gguf
from tests.helpers.weight_engines import assert_holds, contents, fresh, make_rank, specs

QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def announce(tensors: dict[str, torch.Tensor], *, sums: bool) -> list:
    manifest = specs(tensors)
    if not sums:
        return manifest
    return [type(s)(s.name, s.dtype, s.shape, checksum(tensors[s.name])) for s in manifest]


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("carrier", update_carriers.NAMES)
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_one_value_fails_the_update(
    mode: str, carrier: str, value: float, sums: bool, tmp_path: Path
) -> None:
    model, rank = make_rank()
    before, new = contents(model), fresh(model)
    bad = {name: tensor.clone() for name, tensor in new.items()}
    bad[QUERY][3, 5] = value
    way = update_carriers.make(carrier, rank, tmp_path)
    for version, tensors in ((4, bad), (5, new)):
        way.prepare(tensors)
        manifest = announce(tensors, sums=sums)
        rank.handle(BeginUpdate(version=version, manifest=manifest, mode=mode))
        way.receive()
        if version == 5:
            break
        for finish in (PrepareUpdate(version=4), CommitUpdate(version=4)):
            with pytest.raises(NonFiniteWeights, match=r"q_proj.*version 4 holds") as refusal:
                rank.handle(finish)
            assert refusal.value.field == QUERY
        rank.handle(AbortUpdate(version=4))
        if mode == "in_place" and carrier != "lent":
            with pytest.raises(WeightUpdateError, match="may be a mixture"):
                rank.session.require_servable()
        else:
            assert_holds(model, before)
            rank.session.require_servable()
    rank.handle(CommitUpdate(version=5))
    assert_holds(model, new)
    rank.session.require_servable()
    getattr(way, "close", rank.close)()


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize(
    "served,fits,overflows",
    [(torch.float16, 65_519.0, 65_520.0), (torch.bfloat16, 3.3895e38, 3.397e38)],
)
def test_what_the_served_dtype_cannot_hold(
    served: torch.dtype, fits: float, overflows: float, mode: str, sums: bool
) -> None:
    model, rank = make_rank(dtype=served)
    new = fresh(model)
    for version, value in ((4, overflows), (5, fits)):
        new[NORM][1] = -value
        rank.handle(BeginUpdate(version=version, manifest=announce(new, sums=sums), mode=mode))
        rank.session.receive(new.items())
        if version == 4:
            with pytest.raises(NonFiniteWeights, match=r"norm") as refusal:
                rank.handle(CommitUpdate(version=4))
            assert refusal.value.field == NORM
            rank.handle(AbortUpdate(version=4))
    rank.handle(CommitUpdate(version=5))
    assert all(bool(tensor.isfinite().all()) for tensor in contents(model).values())


def test_the_bound_is_where_rounding_puts_it() -> None:
    for source, value, fits in (
        (torch.float32, 65_519.0, True),
        (torch.float32, 65_520.0, False),
        (torch.float64, 65_519.0, True),
        (torch.float64, 65_520.0, False),
        (torch.bfloat16, 65_280.0, True),
        (torch.bfloat16, 65_536.0, False),
    ):
        tensor = torch.tensor([1.0, -value], dtype=source)
        assert bool(tensor.to(torch.float16).isfinite().all()) == fits
        assert (find_unfit([("w", tensor, torch.float16)]) is None) == fits


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_is_refused_by_tensor_and_file(tmp_path: Path, value: float) -> None:
    write_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[NORM][3] = value
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(.*model\.safetensors\)"):
        make_replica(tmp_path)


def test_a_checkpoint_beyond_the_dtype_it_is_served_in(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[NORM][3] = 1e6
    save_file(tensors, file)
    make_replica(tmp_path).close()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*float16"):
        make_replica(tmp_path, dtype="float16")


@pytest.mark.parametrize("sent", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_a_float16_engine_refuses_what_overflows_and_takes_what_fits(
    mode: str, sent: torch.dtype
) -> None:
    """Of a trainer in a wider dtype; one in float16 itself sends inf, which is refused too."""
    model, rank = make_rank(dtype=torch.float16)
    good = {name: tensor.to(sent) for name, tensor in fresh(model).items()}
    for version, value, dtype in ((4, 1e5, sent), (5, 1e5, torch.float16), (6, 5e4, sent)):
        new = {name: tensor.to(dtype).clone() for name, tensor in good.items()}
        new[QUERY][3, 5] = value
        rank.handle(BeginUpdate(version=version, manifest=specs(new), mode=mode))
        rank.session.receive(new.items())
        if version < 6:
            with pytest.raises(NonFiniteWeights, match=r"q_proj.*(float16 cannot|inf)"):
                rank.handle(CommitUpdate(version=version))
            rank.handle(AbortUpdate(version=version))
    rank.handle(CommitUpdate(version=6))
    assert contents(model)[QUERY][3, 5] == torch.tensor(5e4, dtype=sent).half()


@pytest.mark.parametrize("carrier", update_carriers.NAMES)
def test_values_beyond_float16_are_refused_however_they_come(carrier: str, tmp_path: Path) -> None:
    model, rank = make_rank(dtype=torch.float16)
    before = contents(model)
    new = {name: tensor.float() for name, tensor in fresh(model).items()}
    new[EMBED][2, 1] = -1e5
    way = update_carriers.make(carrier, rank, tmp_path)
    way.prepare(new)
    rank.handle(BeginUpdate(version=4, manifest=specs(new), mode="shadow"))
    way.receive()
    for finish in (PrepareUpdate(version=4), CommitUpdate(version=4)):
        with pytest.raises(NonFiniteWeights, match="float16 cannot hold") as refusal:
            rank.handle(finish)
        assert refusal.value.field == EMBED
    rank.handle(AbortUpdate(version=4))
    assert_holds(model, before)
    getattr(way, "close", rank.close)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_a_wider_dtype_is_read_before_it_is_rounded(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """The error tells the value, which inf would not."""
    write_tiny(tmp_path, "llama", dtype=dtype)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[QUERY][3, 5] = -1e5
    save_file(tensors, file)
    make_replica(tmp_path, dtype="bfloat16").close()
    with pytest.raises(CheckpointError, match=r"q_proj.*model\.safetensors.*values up to") as told:
        make_replica(tmp_path, dtype="float16")
    assert told.value.field == QUERY


def test_values_beyond_float16_in_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    with mock.patch("tests.helpers.tiny_models.tiny_hf", _with_a_large_norm):
        write_tiny_gguf(path)
    make_replica(path, dtype="bfloat16").close()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(.*tiny\.gguf\).*float16"):
        make_replica(path, dtype="float16")


def _with_a_large_norm(*args: Any, **options: Any) -> Any:
    model = tiny_hf(*args, **options)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    return model


def test_a_tensor_too_small_for_float16_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny(tmp_path, "qwen2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    bias = "model.layers.1.self_attn.k_proj.bias"
    tensors[bias] *= 1e-7
    # Zeros are no loss, nor are small values beside larger ones.
    tensors["model.layers.0.self_attn.k_proj.bias"].zero_()
    tensors[QUERY][0] *= 1e-7
    save_file(tensors, file)
    for dtype in ("bfloat16", "float16"):
        caplog.clear()
        make_replica(tmp_path, dtype=dtype).close()
        told = [r.getMessage() for r in caplog.records if "no value above" in r.getMessage()]
        assert [text.split()[0] for text in told] == ([bias] if dtype == "float16" else [])
