"""Before anything is timed: the small kernels against higher precision and their chains.

R rows, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from small_kernels_products import DTYPE, SHAPES, Case, Shape, pick

from kernels.embedding import embed_rms_norm
from kernels.kv_copy import write_kv
from kernels.linear import Options, reference
from kernels.norm import rms_norm
from kernels.rotary import HeadNorms, KVTarget, apply_rotary, rotate_and_store
from kernels.testing import assert_close, poisoned_allocations

HEADS = {"1.5B": (12, 2, False), "8B": (32, 8, True)}


def exact(x_RI: torch.Tensor, weight_OI: torch.Tensor, options: Options) -> torch.Tensor:
    """The product in float64 between the rounding of the separate kernels."""
    norm_weight = options.norm_weight_I
    if norm_weight is not None:
        x_RI = rms_norm(x_RI, norm_weight, options.eps, backend="torch")
    bias = None if options.bias_O is None else options.bias_O.double()
    wide = reference.fused_linear(x_RI.double(), weight_OI.double(), Options(bias_O=bias))
    plain = wide.to(x_RI.dtype)
    if options.gated:
        gate, up = plain.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return plain if options.residual_RO is None else options.residual_RO + plain


def check_product(shape: Shape) -> None:
    """Every number of rows against float64; repeats bit for bit."""
    case = Case(shape)
    weight = case.weights[0]
    full = case.run(16, weight, pick({}, shape, 16))
    for rows in (1, 2, 5, 16):
        config = pick({}, shape, rows)
        residual = case.residual[:rows] if shape.residual else None
        want = exact(case.x[:rows], weight, replace(case.options, residual_RO=residual))
        with poisoned_allocations():
            got = case.run(rows, weight, config)
        assert_close(f"{shape.name} {rows} rows {config}", got, want, DTYPE)
        for _ in range(3):
            assert torch.equal(case.run(rows, weight, config), got), "not deterministic"
        if rows > 1:
            assert torch.equal(full[:rows], got), f"{shape.name}: depends on the rows beside it"
    assert case.options.counters is not None and not case.options.counters.any()


def check_rotation(name: str, tokens: int) -> None:
    """The fused kernel against the separate ones; bit for bit where no norm comes first."""
    heads, kv_heads, norm = HEADS[name]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * 128, device="cuda", dtype=DTYPE)
    positions = torch.randint(0, 4096, (tokens,), device="cuda")
    cos_sin = torch.rand(4096, 128, device="cuda") * 2 - 1
    slots = torch.randperm(2048, device="cuda")[:tokens]
    norms = None
    q, k, v = qkv.unflatten(-1, (-1, 128)).split([heads, kv_heads, kv_heads], dim=1)
    if norm:
        weights = torch.rand(2, 128, device="cuda", dtype=DTYPE) + 0.5
        norms = HeadNorms(weights[0], weights[1], 1e-6)
        q = rms_norm(q, weights[0], 1e-6, backend="triton")
        k = rms_norm(k, weights[1], 1e-6, backend="triton")
    want_q, want_k = apply_rotary(q, k, positions, cos_sin, backend="triton")
    pages = [torch.zeros(128, 16, kv_heads, 128, device="cuda", dtype=DTYPE) for _ in range(4)]
    write_kv(want_k, v, pages[0], pages[1], slots, backend="triton")
    target = KVTarget(pages[2], pages[3], slots)
    with poisoned_allocations():
        got_q = rotate_and_store(qkv, positions, cos_sin, target, norms=norms, backend="triton")
    assert torch.equal(pages[1], pages[3]), "values"
    pairs = [("queries", got_q, want_q), ("keys", pages[2], pages[0])]
    for what, got, want in pairs:
        assert_close(f"{name} {what}", got, want, DTYPE)
        same = (got == want).float().mean().item()
        print(f"  {name} {tokens} tokens {what}: {same:.6f} of the elements bit-equal")
        assert norm or same == 1.0


def check_embedding() -> None:
    """The fused lookup against an embedding and the norm kernel, bit for bit."""
    table = torch.randn(1000, 1536, device="cuda", dtype=DTYPE)
    ids = torch.randint(0, 1000, (33,), device="cuda")
    weight = torch.rand(1536, device="cuda", dtype=DTYPE)
    normed, rows = embed_rms_norm(ids, table, weight, 1e-6, backend="triton")
    assert torch.equal(rows, table[ids])
    assert torch.equal(normed, rms_norm(table[ids], weight, 1e-6, backend="triton"))


def run() -> str:
    """Check everything; raises AssertionError after trying all."""
    failures = []
    checks = [(check_embedding, ())]
    checks += [(check_rotation, (name, tokens)) for name in HEADS for tokens in (1, 33)]
    checks += [(check_product, (shape,)) for shape in SHAPES]
    for check, args in checks:
        try:
            check(*args)
        except AssertionError as error:
            failures.append(f"{check.__name__}{args}: {error}")
            print("  FAILED", failures[-1])
        torch.cuda.empty_cache()
    assert not failures, f"{len(failures)} of {len(checks)} checks failed"
    print(f"  {len(checks)} checks passed")
    return "passed"
