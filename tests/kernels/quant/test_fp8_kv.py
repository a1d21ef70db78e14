"""The codec of fp8 KV: numbers by hand, error, edges, and Triton's bits against torch's."""

from __future__ import annotations

import pytest
import torch

from kernels.kv_copy import write_kv
from kernels.quant.fp8_kv import CODE, LARGEST, KVScales, as_bytes, decode, encode
from kernels.rotary import KVTarget, rotate_and_store
from kernels.testing import poison, triton_device

PAGES, SIZE, TOKENS = 7, 4, 11


def codes(x: torch.Tensor) -> list[int]:
    return as_bytes(encode(x)[0]).flatten().tolist()


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heads of very different sizes, with elements near zero among large ones."""
    x = torch.randn(*shape) * torch.logspace(-6, 4, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (x * 10.0 ** -torch.randint(0, 7, shape)).to(dtype)


def test_numbers_by_hand() -> None:
    """Of a head whose largest is 448 the scale is 1: codes are those of e4m3 (sign, four bits of
    exponent with a bias of 7, three of mantissa), nearest even, subnormal below 2**-6."""
    x = torch.tensor([448.0, 1.0, -0.5, 1.0625, 1.1875, 2**-6, 2**-9, 2**-10, 3 * 2**-10, -0.0])
    want = [0x7E, 0x38, 0xB0, 0x38, 0x3A, 0x08, 0x01, 0x00, 0x02, 0x80]
    assert codes(x) == want
    assert encode(x)[1].item() == 1.0
    # The scale is rounded to bfloat16: here from 1 / 448 down, so that the largest is clamped.
    q, scale = encode(torch.tensor([1.0, -1.0]))
    assert scale.item() == torch.tensor(1 / 448).bfloat16().item() < 1 / 448
    assert q.float().tolist() == [LARGEST, -LARGEST]


def test_what_is_read_is_within_half_a_step_of_what_was_stored() -> None:
    x = heads(400, 3, 64)
    q, scale = encode(x)
    error = (decode(q, scale, torch.float32) - x).abs()
    step = torch.maximum(x.abs() * 2**-4, scale.float().unsqueeze(-1) * 2**-10)
    # The largest of a head may be clamped, by what rounding took from its scale.
    step = torch.maximum(step, x.abs().amax(-1, keepdim=True) * 2**-9)
    assert (error <= step * 1.0001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_is_stored_alike_whatever_is_beside_it(dtype: torch.dtype) -> None:
    x = heads(40, 3, 64, dtype=dtype)
    q, scale = encode(x)
    for token in (0, 7, 39):
        alone = encode(x[token : token + 1, 1:2])
        assert torch.equal(as_bytes(alone[0])[0, 0], as_bytes(q)[token, 1])
        assert torch.equal(alone[1][0, 0], scale[token, 1])


def test_the_edges() -> None:
    """Zeros, heads too small for a scale, and what is not finite."""
    x = torch.ones(5, 16)
    x[0] = 0.0
    x[1] = 2.0**-101
    x[2, 3], x[3, 4], x[4, 5] = float("nan"), float("inf"), -float("inf")
    q, scale = encode(x)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert scale[2:].isnan().all()
    assert not as_bytes(q).any()
    assert decode(q, scale, torch.float32)[2:].isnan().all()
    assert not decode(q, scale, torch.float32)[:2].any()


def target_for(kv_heads: int, head_dim: int, slots: torch.Tensor) -> KVTarget:
    """Pages and scales that hold what nobody wrote."""
    pages = [torch.full((PAGES, SIZE, kv_heads, head_dim), 0x7F, dtype=torch.uint8) for _ in "kv"]
    scales = [poison(torch.empty(PAGES, kv_heads, SIZE, dtype=torch.bfloat16)) for _ in "kv"]
    device = slots.device
    k_pages, v_pages = (part.to(device).view(CODE) for part in pages)
    return KVTarget(k_pages, v_pages, slots, KVScales(*(part.to(device) for part in scales)))


def slots_on(device: str) -> torch.Tensor:
    slots = torch.randperm(PAGES * SIZE)[:TOKENS]
    slots[[2, 8]] = -1
    return slots.to(device)


def assert_same(got: KVTarget, want: KVTarget) -> None:
    assert torch.equal(as_bytes(got.k_pages_NGKD), as_bytes(want.k_pages_NGKD))
    assert torch.equal(as_bytes(got.v_pages_NGKD), as_bytes(want.v_pages_NGKD))
    assert got.scales is not None and want.scales is not None
    for mine, theirs in zip(got.scales, want.scales, strict=True):
        assert torch.equal(mine.nan_to_num(-1.0), theirs.nan_to_num(-1.0))


def write(k: torch.Tensor, v: torch.Tensor, target: KVTarget, backend: str) -> None:
    pages = (target.k_pages_NGKD, target.v_pages_NGKD)
    write_kv(k, v, *pages, target.slots_T, scales=target.scales, backend=backend)


def test_a_write_fills_its_slots_and_no_other() -> None:
    slots = slots_on("cpu")
    target, want = target_for(3, 20, slots), target_for(3, 20, slots)
    k, v = heads(TOKENS, 3, 20), heads(TOKENS, 3, 20)
    write(k, v, target, "torch")
    assert want.scales is not None
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, SIZE)
        for x, pages, scales in (
            (k, want.k_pages_NGKD, want.scales.k_NKG),
            (v, want.v_pages_NGKD, want.scales.v_NKG),
        ):
            q, scale = encode(x[token])
            as_bytes(pages)[page, offset] = as_bytes(q)
            scales[page, :, offset] = scale
    assert_same(target, want)


def odd_heads(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    x = heads(*shape, dtype=dtype)
    x[1], x[3, -1, 1], x[4, :, 2] = 0.0, float("nan"), float("inf")
    x[5] = 1e-7 if dtype == torch.float16 else 2.0**-101
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(1, 16), (3, 63), (2, 128)])
def test_triton_writes_the_bits_of_torch(dims: tuple[int, int], dtype: torch.dtype) -> None:
    slots = slots_on(triton_device())
    target, want = target_for(*dims, slots), target_for(*dims, slots)
    k, v = (odd_heads(dtype, TOKENS, *dims).to(slots.device) for _ in "kv")
    write(k, v, want, "torch")
    write(k, v, target, "triton")
    assert_same(target, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(9, 3, 64), (4, 2, 80), (3, 1, 12), (12, 2, 128)])
def test_the_rotating_kernel_writes_the_bits_of_torch(
    dims: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Values to the bit; keys to the bit of what the rotation of Triton made of them."""
    num_heads, kv_heads, head_dim = dims
    device = triton_device()
    slots = slots_on(device)
    qkv = odd_heads(dtype, TOKENS, num_heads + 2 * kv_heads, head_dim).flatten(1).to(device)
    positions = torch.randperm(100)[:TOKENS].to(device)
    angle = torch.rand(100, head_dim // 2) * 6.3
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)
    shape = (PAGES, SIZE, kv_heads, head_dim)
    plain = KVTarget(*(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"), slots)
    want_q = rotate_and_store(qkv, positions, cos_sin, plain, backend="triton")
    target, want = (target_for(kv_heads, head_dim, slots) for _ in range(2))
    places = slots.clamp(min=0)
    k, v = (
        pages.view(-1, kv_heads, head_dim)[places]
        for pages in (plain.k_pages_NGKD, plain.v_pages_NGKD)
    )
    write(k, v, want, "torch")
    got_q = rotate_and_store(qkv, positions, cos_sin, target, backend="triton")
    assert torch.equal(got_q.nan_to_num(9.0), want_q.nan_to_num(9.0))
    assert_same(target, want)
    for one in (slice(0, 1), slice(4, 7)):
        alone = target_for(kv_heads, head_dim, slots[one])
        rotate_and_store(qkv[one], positions[one], cos_sin, alone, backend="triton")
        for slot in slots[one].tolist():
            page, offset = divmod(slot, SIZE)
            if slot >= 0:
                assert torch.equal(
                    as_bytes(alone.k_pages_NGKD)[page, offset],
                    as_bytes(target.k_pages_NGKD)[page, offset],
                )
