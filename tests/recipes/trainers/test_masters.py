"""Where float32 masters start, and what they round to."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from engine.errors import CheckpointError
from recipes.trainers.masters import Masters, dither, require_range
from tests.helpers.tiny_models import tiny_hf


def grid(dtype: torch.dtype) -> torch.Tensor:
    """Many exponents, both signs, powers of two, subnormals, the largest, and zeros."""
    torch.manual_seed(0)
    drawn = torch.randn(4000) * torch.logspace(-8, 8, 4000, base=2)
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-14, 2.0**-24, torch.finfo(dtype).max])
    return torch.cat([drawn, edges, -edges]).to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dithered_masters_round_to_the_checkpoint_and_are_spread_over_their_cells(
    dtype: torch.dtype,
) -> None:
    before = grid(dtype)
    after = before.clone()
    assert dither([("w", after)], dtype, seed=1) == ["w"]
    assert torch.equal(after.to(dtype), before.to(dtype))
    moved = before[:4000] != 0
    assert (after[:4000][moved] != before[:4000][moved]).float().mean() > 0.99
    # In units of the cell's half-width, a uniform draw has mean 0 and mean magnitude 1/2.
    ulp = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(before[:4000].abs()))
    place = (after[:4000] - before[:4000]) / (ulp / 2)
    assert place.mean().abs() < 0.05
    assert place.abs().mean() == pytest.approx(0.5, abs=0.05)


def test_the_draw_depends_on_seed_and_name_alone() -> None:
    one, other, renamed, reseeded = (grid(torch.bfloat16) for _ in range(4))
    dither([("x", grid(torch.bfloat16)), ("w", one)], torch.bfloat16, seed=3)
    dither([("w", other)], torch.bfloat16, seed=3)
    dither([("v", renamed)], torch.bfloat16, seed=3)
    dither([("w", reseeded)], torch.bfloat16, seed=4)
    assert torch.equal(one, other)
    assert not torch.equal(one, renamed)
    assert not torch.equal(one, reseeded)


def test_a_bfloat16_checkpoint_is_dithered_in_float16_but_for_what_is_below_its_grid() -> None:
    """float16 holds every bfloat16 number down to 2**-17, and rounds what is smaller."""
    torch.manual_seed(0)
    before = (0.05 * torch.randn(20_000)).bfloat16().float()
    before[:200] = (2.0**-19 * torch.rand(200)).bfloat16().float()
    off = before.half().float() != before
    assert 0 < off.sum() <= 200
    after = before.clone()
    assert dither([("w", after)], torch.float16, seed=1) == ["w"]
    assert torch.equal(after.half(), before.half())
    assert torch.equal(after[off], before[off])
    assert (after[~off] != before[~off]).float().mean() > 0.99
    # float32 weights are off the grid where it is fine, however many small ones are on it.
    mixed = torch.cat([before, torch.randn(10)])
    assert dither([("w", mixed)], torch.float16, seed=1) == []


def test_ties_stay_where_they_are() -> None:
    """Masters at the very edge of a cell round to the even neighbour, which may be another: none is
    put there, whatever the draw."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = every.view(dtype).float()
        numbers = numbers[numbers.isfinite()]
        for place in (0.0, 1.0, 0.5):
            moved = numbers.clone()
            with mock.patch.object(torch, "rand", lambda s, place=place, **_: torch.full(s, place)):
                dither([("w", moved)], dtype, seed=0)
            assert torch.equal(moved.to(dtype), numbers.to(dtype))


def test_values_that_the_dtype_cannot_hold_are_refused_by_name() -> None:
    named = [("a", torch.ones(3)), ("b", torch.tensor([1.0, -65_519.0]))]
    require_range(named, torch.float16)
    bad = [*named, ("c", torch.tensor([0.0, -65_520.0]))]
    require_range(bad, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"c has values up to 65520, which float16") as told:
        require_range(bad, torch.float16)
    assert told.value.field == "c"


def test_weights_off_the_grid_are_left_alone() -> None:
    tensor = torch.randn(64)
    before = tensor.clone()
    assert dither([("w", tensor)], torch.bfloat16, seed=0) == []
    assert torch.equal(tensor, before)


def test_steps_far_below_a_cell_show_in_the_right_share_of_dithered_weights() -> None:
    """A step of a tenth of a cell changes a tenth of the bfloat16 weights; from the centres of
    the cells it changes none."""
    torch.manual_seed(0)
    centres = (1 + torch.rand(20000)).bfloat16().float()
    dithered = centres.clone()
    dither([("w", dithered)], torch.bfloat16, seed=0)
    step = 0.1 * torch.finfo(torch.bfloat16).eps
    served = centres.bfloat16()
    assert torch.equal((centres + step).bfloat16(), served)
    changed = ((dithered + step).bfloat16() != served).float().mean()
    assert changed == pytest.approx(0.1, abs=0.02)


def test_only_parameters_change_their_dtype() -> None:
    model = tiny_hf("llama", vocab_size=20, hidden_size=32, head_dim=8)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    masters = Masters(model, torch.bfloat16)
    assert buffers, "rotary frequencies are buffers"
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name])
    state = {name: tensor + 1 for name, tensor in masters.state().items()}
    masters.load(state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name].bfloat16()), name
