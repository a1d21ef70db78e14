"""Time every op on a GPU: `python -m kernels.bench`.

For each op: microseconds of the Triton kernel inside a CUDA graph (so without launch
overhead), the memory traffic it needs at least over that time, and how much longer the
torch reference takes. Inputs are larger than the cache where the op's real ones are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.activation import silu_mul
from kernels.attention import SharedTiles, paged_attention
from kernels.backend import KernelBackend
from kernels.kv_copy import write_kv
from kernels.moe import run_experts
from kernels.norm import add_rms_norm, rms_norm
from kernels.rotary import apply_rotary
from kernels.sampling import sample

REPEATS = 20
DTYPE = torch.bfloat16


class Case(NamedTuple):
    """One row of the table; `run` is called with a backend name, `moved` is in bytes."""

    name: str
    run: Callable[[KernelBackend], Any]
    moved: int


def time_us(call: Callable[[], Any], *, graph: bool) -> float:
    """Microseconds of one call on the current CUDA device, mean of REPEATS after warm-up.

    graph: capture the calls first; not possible for a call that waits for the device.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(REPEATS):
                call()
        captured.replay()
        return _elapsed_us(captured.replay) / REPEATS
    return _elapsed_us(lambda: [call() for _ in range(REPEATS)]) / REPEATS


def _elapsed_us(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def _size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _dense_cases(tokens: int = 4096, hidden: int = 4096, inner: int = 14336) -> Iterator[Case]:
    x, residual, weight = _randn(tokens, hidden), _randn(tokens, hidden), _randn(hidden)
    yield Case("rms_norm", lambda b: rms_norm(x, weight, 1e-5, backend=b), 2 * _size(x))
    yield Case(
        "add_rms_norm", lambda b: add_rms_norm(x, residual, weight, 1e-5, backend=b), 4 * _size(x)
    )
    gate_up = _randn(tokens, 2 * inner)
    yield Case("silu_mul", lambda b: silu_mul(gate_up, backend=b), _size(gate_up) * 3 // 2)
    q, k, v = _randn(tokens, 32, 128), _randn(tokens, 8, 128), _randn(tokens, 8, 128)
    positions, cos_sin = torch.arange(tokens, device="cuda"), torch.rand(tokens, 128, device="cuda")
    yield Case(
        "apply_rotary",
        lambda b: apply_rotary(q, k, positions, cos_sin, backend=b),
        2 * _size(q, k) + _size(cos_sin),
    )
    k_pages, v_pages = _randn(1024, 16, 8, 128), _randn(1024, 16, 8, 128)
    slots = torch.randperm(1024 * 16, device="cuda")[:tokens]
    yield Case(
        "write_kv",
        lambda b: write_kv(k, v, k_pages, v_pages, slots, backend=b),
        2 * _size(k, v),
    )


def _attention_case(name: str, rows: int, queries: int, kv_len: int) -> Case:
    columns = -(-kv_len // 16)
    k_pages, v_pages = _randn(rows * columns, 16, 8, 128), _randn(rows * columns, 16, 8, 128)
    table = torch.randperm(rows * columns, device="cuda").int().view(rows, columns)
    query_start = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * queries
    kv_lens = torch.full((rows,), kv_len, device="cuda", dtype=torch.int32)
    q = _randn(rows * queries, 32, 128)

    def run(backend: KernelBackend) -> torch.Tensor:
        return paged_attention(
            q,
            k_pages,
            v_pages,
            table,
            query_start,
            kv_lens,
            scale=128**-0.5,
            max_query_len=queries,
            backend=backend,
        )

    return Case(name, run, _size(k_pages, v_pages) + 2 * _size(q))


def _grouped_case(name: str, groups: int, samples: int, shared: int, own: int) -> Case:
    """Decode of `samples` rows a prompt of `shared` tokens, `own` more each."""
    pages, columns = shared // 16, (shared + own) // 16
    rows = groups * samples
    k_pages, v_pages = _randn(rows * columns, 16, 8, 128), _randn(rows * columns, 16, 8, 128)
    table = torch.randperm(rows * columns, device="cuda").int().view(groups, samples, columns)
    table[:, :, :pages] = table[:, :1, :pages]
    first = torch.arange(groups, device="cuda", dtype=torch.int32) * samples
    tiles = SharedTiles(
        torch.stack((first, torch.full_like(first, samples), torch.full_like(first, shared)), 1),
        torch.full((rows,), shared, device="cuda", dtype=torch.int32),
    )
    query_start = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
    kv_lens = torch.full((rows,), shared + own, device="cuda", dtype=torch.int32)
    q = _randn(rows, 32, 128)

    def run(backend: KernelBackend) -> torch.Tensor:
        return paged_attention(
            q,
            k_pages,
            v_pages,
            table.view(rows, columns),
            query_start,
            kv_lens,
            scale=128**-0.5,
            max_query_len=1,
            shared=tiles,
            backend=backend,
        )

    read = _size(k_pages, v_pages) * (groups * pages + rows * (columns - pages))
    return Case(name, run, read // (rows * columns) + 2 * _size(q))


def _sample_case(rows: int, vocab: int) -> Case:
    logits, temperature = _randn(rows, vocab), torch.ones(rows, device="cuda")
    seed, position = torch.randint(2**60, (2, rows), device="cuda")
    return Case(
        f"sample {rows}x{vocab}",
        lambda b: sample(logits, temperature, seed, position, backend=b),
        _size(logits),
    )


def _experts_case(rows: int, slots: int = 32, hidden: int = 2048, inner: int = 768) -> Case:
    """A quarter of a layer of Qwen3-30B-A3B, and a quarter of its experts of a token."""
    gate_up, down = _randn(slots, 2 * inner, hidden), _randn(slots, hidden, inner)
    x, weights = _randn(rows, hidden), torch.rand(rows, 2, device="cuda").to(DTYPE)
    ids = torch.rand(rows, slots, device="cuda").argsort(-1)[:, :2].int().contiguous()
    share = len(ids.unique()) / slots
    return Case(
        f"run_experts {rows}",
        lambda b: run_experts(x, gate_up, down, ids, weights, backend=b),
        int(share * _size(gate_up, down)) + 2 * _size(x),
    )


def cases() -> Iterator[Case]:
    """Shapes of an 8B model, 32 heads over 8 kv heads of 128, and of experts; built one at a
    time."""
    yield from _dense_cases()
    yield _attention_case("decode 64 x 4096", 64, 1, 4096)
    yield _attention_case("decode 256 x 1024", 256, 1, 1024)
    yield _attention_case("decode 1 x 32768", 1, 1, 32768)
    yield _grouped_case("decode 16 x 16, 512 shared", 16, 16, 512, 256)
    yield _attention_case("prefill 4 x 2048", 4, 2048, 2048)
    yield _attention_case("extend 8 x 256 of 4096", 8, 256, 4096)
    yield _experts_case(1)
    yield _experts_case(64)
    yield _experts_case(1024)
    yield _sample_case(64, 49152)
    yield _sample_case(256, 151936)


def main(argv: Sequence[str] = ()) -> int:
    """Print the table, and write it as JSON with `--json FILE`; 1 if there is no GPU to time."""
    write = sys.stdout.write
    if not torch.cuda.is_available():
        write("kernels.bench times GPU kernels and needs a CUDA GPU; torch sees none.\n")
        return 1
    rows = []
    write(f"{torch.cuda.get_device_name()}, {DTYPE}, torch {torch.__version__}\n")
    write(f"{'op':<28}{'us':>10}{'GB/s':>10}{'torch / triton':>16}\n")
    for case in cases():
        kernel_us = time_us(partial(case.run, "triton"), graph=True)
        reference_us = time_us(partial(case.run, "torch"), graph=False)
        rate, ratio = case.moved / kernel_us / 1e3, reference_us / kernel_us
        write(f"{case.name:<28}{kernel_us:>10.1f}{rate:>10.0f}{ratio:>16.1f}\n")
        rows.append({"op": case.name, "us": kernel_us, "gb_per_s": rate, "torch_ratio": ratio})
    if len(argv) == 2 and argv[0] == "--json":
        machine = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
        text = json.dumps({**machine, "dtype": str(DTYPE), "rows": rows}, indent=2)
        Path(argv[1]).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
