"""Attention over fp8 pages: the same as over what they stand for, whichever kernel reads them."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import paged_attention
from kernels.quant.fp8_kv import decode
from kernels.testing import assert_close, poisoned_allocations, triton_device
from tests.helpers.scaled_pages import scaled
from tests.kernels.attention.test_grouped import MIXED, WIDE, Group
from tests.kernels.attention.test_grouped import Batch as GroupBatch
from tests.kernels.attention.test_grouped import make as make_groups
from tests.kernels.attention.test_paged_attention import ROWS, WINDOWED, Case, make


def stood_for(codes: torch.Tensor, scale_NKG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pages [N, G, K, D] of the numbers that are read."""
    return decode(codes, scale_NKG.transpose(1, 2), dtype)


def run(
    case: Case | GroupBatch, backend: str, *, poisoned: bool = False, **options
) -> torch.Tensor:
    """Attention of a case whose pages become fp8."""
    k, v, scales = scaled(case.k_pages, case.v_pages)
    rest = (case.table, case.query_start, case.kv_len)
    options = {"max_query_len": int(case.query_start.diff().max()), **options}

    def call() -> torch.Tensor:
        return paged_attention(
            case.q,
            k,
            v,
            *rest,
            scale=case.q.shape[-1] ** -0.5,
            scales=scales,
            backend=backend,
            **options,
        )

    if not poisoned:
        return call()
    with poisoned_allocations():
        return call()


@pytest.mark.parametrize("window", [None, 7])
def test_the_reference_attends_to_what_codes_stand_for(window: int | None) -> None:
    case = make(ROWS, head_dim=20)
    k, v, scales = scaled(case.k_pages, case.v_pages)
    pages = [stood_for(*pair, torch.float32) for pair in zip((k, v), scales, strict=True)]
    want = case._replace(k_pages=pages[0], v_pages=pages[1]).run("torch", window=window)
    assert torch.equal(run(case, "torch", window=window), want)
    plain = case.run("torch", window=window)
    assert not torch.allclose(want, plain, atol=1e-3), "as if nothing had been rounded"
    assert torch.allclose(want, plain, atol=0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_triton_matches_the_reference(head_dim: int, dtype: torch.dtype) -> None:
    if triton_device() == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 dot")
    case = make(ROWS, head_dim=head_dim, dtype=dtype, device=triton_device())
    got = run(case, "triton", poisoned=True)
    assert_close("scaled", got, run(case, "torch"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 16, 128, 1000])
def test_triton_matches_the_reference_in_a_window(window: int) -> None:
    case = make(WINDOWED, head_dim=32, page_size=16, device=triton_device())
    got = run(case, "triton", poisoned=True, window=window)
    assert_close("scaled", got, run(case, "torch", window=window), torch.float32)


@pytest.mark.gpu
def test_a_scale_that_is_not_finite_reaches_whoever_sees_it() -> None:
    """Keys or values of one position of one head; a window hides it from later rows."""
    case = make([(1, 40), (1, 9), (1, 40)], (4, 2), page_size=16, device=triton_device())
    for kept in ("k_pages", "v_pages"):
        pages = getattr(case, kept).clone()
        page = int(case.table[0, 1])
        pages[page, 3, 0, 5] = float("inf")
        bad = case._replace(**{kept: pages})
        got, clean = run(bad, "triton"), run(case, "triton")
        assert got[0, :2].isnan().all()
        assert torch.equal(got[0, 2:], clean[0, 2:]) and torch.equal(got[1:], clean[1:])
        hidden = run(bad, "triton", window=8)
        assert torch.equal(hidden, run(case, "triton", window=8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_alone_and_in_chunks(dtype: torch.dtype) -> None:
    device = triton_device()
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 dot")
    case = make([(1, 300), (40, 40), (3, 3), (1, 9)], dtype=dtype, device=device)
    together = run(case, "triton")
    starts = case.query_start.tolist()
    for row, tail in ((0, 1), (1, 40), (1, 5), (2, 3), (3, 1)):
        queries = slice(starts[row + 1] - tail, starts[row + 1])
        alone = case._replace(
            q=case.q[queries],
            table=torch.nn.functional.pad(case.table[row : row + 1], (0, 200)),
            query_start=torch.tensor([0, tail], dtype=torch.int32, device=device),
            kv_len=case.kv_len[row : row + 1],
        )
        assert torch.equal(run(alone, "triton"), together[queries]), f"row {row}, last {tail}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_whole_rows_are_bit_equal_to_merged_splits(head_dim: int, dtype: torch.dtype) -> None:
    from kernels.attention.decode import decode_attention

    rows = [(1, kv_len) for kv_len in (1, 127, 128, 129, 700)]
    if triton_device() != "cpu":
        rows += [(1, 4097), (1, 9000)]
    case = make(rows, (12, 2), head_dim, 16, dtype, triton_device())
    k, v, scales = scaled(case.k_pages, case.v_pages)
    outs = []
    for whole in (True, False):
        outs.append(torch.full_like(case.q, float("nan")))
        rest = (case.table, case.query_start, case.kv_len, head_dim**-0.5, outs[-1])
        decode_attention(case.q, k, v, *rest, whole=whole, scales=scales)
    assert torch.equal(*outs)
    assert_close("scaled", outs[0], run(case, "torch"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_match_the_reference(dtype: torch.dtype) -> None:
    batch = make_groups(MIXED, dtype=dtype)
    got = run(batch, "triton", poisoned=True, shared=batch.tiles)
    assert_close("grouped", got, run(batch, "torch"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [-90, -30, 30, 100])
def test_queries_and_values_of_any_magnitude_keep_their_digits(exponent: int) -> None:
    """Products of float16 have its range; magnitudes that it does not have are taken out first, of
    each row and of each block by itself."""
    device, dtype = triton_device(), torch.bfloat16
    case = make([(1, 300), (1, 40), (1, 129)], (4, 2), 32, 16, dtype, device)
    factor = 2.0**exponent
    far = case._replace(v_pages=case.v_pages * factor)
    got = run(far, "triton").float() / factor
    assert_close("values", got.to(dtype), run(case, "torch"), dtype)
    # Queries as many times larger as keys are smaller: the same scores.
    k = (case.k_pages.float() / factor).to(dtype)
    far = case._replace(q=(case.q.float() * factor).to(dtype), k_pages=k)
    assert_close("queries", run(far, "triton"), run(case, "torch"), dtype)


@pytest.mark.gpu
def test_a_large_value_takes_no_digits_from_the_others_of_its_block() -> None:
    """2**16 times theirs, at a position that its row hardly looks at."""
    device, dtype = triton_device(), torch.bfloat16
    case = make([(1, 100), (1, 250)], (4, 2), 32, 16, dtype, device)
    for row, position in ((0, 7), (1, 200)):
        page = int(case.table[row, position // 16])
        case.v_pages[page, position % 16] *= 2**16
        case.k_pages[page, position % 16] = -6
    case.q.fill_(1)
    assert_close("values", run(case, "triton"), run(case, "torch"), dtype)


@pytest.mark.gpu
def test_queries_of_zeros_see_every_position_alike() -> None:
    case = make([(1, 200)], (4, 2), 32, 16, torch.bfloat16, triton_device())
    case.q.zero_()
    assert_close("zeros", run(case, "triton"), run(case, "torch"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(triton_device() == "cpu", reason="needs the GPU's tensor cores")
@pytest.mark.parametrize("heads", [(12, 2), (32, 8), (28, 4)])
def test_grouped_is_bit_equal_to_plain(heads: tuple[int, int]) -> None:
    batch = make_groups([*WIDE, Group(16, 1024, (130,))], heads, 128, torch.bfloat16)
    grouped = run(batch, "triton", shared=batch.tiles)
    assert torch.equal(grouped, run(batch, "triton"))
    assert_close("grouped", grouped, run(batch, "torch"), torch.bfloat16)
