"""The largest magnitude of each tensor, exact, and NaN wherever one element is."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.checksum import checksum_into
from kernels.finite import peaks

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]
SIZES = [1, 2, 63, 100, (1 << 14) - 1, 1 << 14, 100_003]
SPECIAL = [math.inf, -math.inf, math.nan]


def found(tensor: torch.Tensor) -> float:
    return float(peaks([tensor], backend="torch")[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_largest_magnitude(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size).to(dtype)
    assert found(tensor) == float(tensor.double().abs().max())
    tensor[size // 2] = -9
    assert found(tensor) == 9.0


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_special_value_anywhere_shows(dtype: torch.dtype, size: int, special: float) -> None:
    for place in {0, size // 2, size - 1}:
        tensor = torch.randn(size).to(dtype)
        tensor[place] = special
        assert not math.isfinite(found(tensor))
        tensor[-1 - place] = -special
        assert not math.isfinite(found(tensor))


@pytest.mark.parametrize("dtype", NARROW)
def test_one_byte_floats(dtype: torch.dtype) -> None:
    tensor = torch.randn(100).to(dtype)
    assert found(tensor) == float(tensor.float().abs().max())
    tensor.view(torch.uint8)[17] = 0x7F
    assert math.isnan(found(tensor))


def test_many_tensors_at_once_keep_their_order() -> None:
    sizes = [0, 3, 20_000, 1, 0, 17, 30_000]
    tensors = [torch.full((size,), -float(i + 1)) for i, size in enumerate(sizes)]
    values = [float(peak) for peak in peaks(tensors, backend="torch")]
    assert values == [i + 1.0 if size else 0.0 for i, size in enumerate(sizes)]


def test_strides_do_not_matter() -> None:
    tensor = torch.randn(200, 300)
    tensor[3, 7] = 50
    assert found(tensor.T) == found(tensor[::3, ::7]) == 50.0


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="abacus"):
        peaks([torch.ones(1)], backend="abacus")  # type: ignore[arg-type]


def bits(dtype: torch.dtype, tensor: torch.Tensor, backend: str = "torch") -> int:
    scan = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    checksum_into(scan[:1], tensor, backend=backend, peak=scan[1:])  # type: ignore[arg-type]
    return int(scan[1])


@pytest.mark.parametrize("dtype", [*DTYPES, *NARROW])
def test_the_checksum_s_pass_finds_the_same_peak(dtype: torch.dtype) -> None:
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tensor = (torch.randn(1100, 1001) * 3).to(dtype)
    want = tensor.double().abs().max()
    got = torch.tensor([bits(dtype, tensor)]).to(words).view(dtype).double()
    assert float(got) == float(want)
    tensor.view(words)[7, 5] = torch.iinfo(words).max if dtype.itemsize > 1 else 0x7F
    assert torch.tensor([bits(dtype, tensor)]).to(words).view(dtype).double().isnan().all()


def test_the_checksum_is_the_same_with_and_without_the_peak() -> None:
    tensor = torch.randn(5000)
    alone = torch.zeros(1, dtype=torch.int64)
    checksum_into(alone, tensor, backend="torch")
    scan = torch.zeros(2, dtype=torch.int64)
    checksum_into(scan[:1], tensor, backend="torch", peak=scan[1:])
    assert int(alone) == int(scan[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_finds_one_value_in_any_tensor_of_many(dtype: torch.dtype) -> None:
    sizes = [0, 0, 3, 70_000, 0, 8192, 1, 65_536, 65_537, 200_001, 0]
    memory = torch.zeros(sum(sizes) + 16 * len(sizes), dtype=dtype, device="cuda")
    tensors, at = [], 0
    for size in sizes:
        tensors.append(memory[at : at + size])
        at += -(-size // 16) * 16
    # None of these lies flat at a multiple of 16 bytes.
    tensors += [memory[1:1000], memory[: 100 * 64].view(100, 64).T[:3]]
    for index, size in enumerate(sizes):
        for place in {0, size // 2, size - 1} if size else ():
            tensors[index][place] = -7
            found = peaks(tensors[:-2], backend="triton").tolist()
            assert found == [7.0 if i == index else 0.0 for i in range(len(sizes))]
            tensors[index][place] = math.nan
            assert math.isnan(peaks(tensors, backend="triton").tolist()[index])
            tensors[index][place] = 0
    memory[3] = 5
    assert peaks(tensors, backend="triton").tolist()[-2:] == [5.0, 0.0]
    memory[64] = math.inf
    assert peaks(tensors, backend="triton").tolist()[-2:] == [math.inf, math.inf]


@pytest.mark.gpu
@pytest.mark.parametrize("special", [None, *SPECIAL])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_finds_the_same(dtype: torch.dtype, special: float | None) -> None:
    tensors = [torch.randn(size).to(dtype) for size in (0, 1, 63, 65_537, 1_000_003)]
    if special is not None:
        for tensor in tensors[1:]:
            tensor[tensor.numel() // 3] = special
    here = [float(peak) for peak in peaks(tensors, backend="torch")]
    there = [float(peak) for peak in peaks([t.cuda() for t in tensors], backend="triton")]
    for one, other in zip(here, there, strict=True):
        assert one == other or (math.isnan(one) and math.isnan(other))
    for tensor in tensors:
        assert bits(dtype, tensor) == bits(dtype, tensor.cuda(), "triton")
