"""Triton against FlashInfer: attention of one layer, and what the host pays to plan it.

    python benchmarks/attention_backends.py [--parts check prefill decode plan invariance]

All times are those of `attend` (KV write included) inside a CUDA graph, over several layers so
that no layer finds the one before it in the L2 cache. `check` compares each back end with the
float32 reference first; a part that fails is reported, the others still run, and the exit status
says so. FlashInfer compiles its kernels at first use, for one to two minutes; set
FLASHINFER_CUDA_ARCH_LIST (9.0a on Hopper) to compile for this GPU alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import numpy as np
import torch
import tyro
from attention_setup import (
    DTYPE,
    LAYERS,
    PAGE,
    SHAPES,
    BackendName,
    Rows,
    Setup,
    attend,
    decode_rows,
)
from machine import describe

from engine.attention.base import AttentionBatch
from engine.attention.flashinfer import paged_rows
from kernels.bench import time_us
from kernels.testing import assert_close

Part = Literal["check", "prefill", "decode", "plan", "invariance"]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    parts: tuple[Part, ...] = ("check", "prefill", "decode", "plan", "invariance")
    """Parts, in order."""
    backends: tuple[BackendName, ...] = ("triton", "fa2", "fa3")
    """Triton and FlashInfer's kernels; decode has no fa3."""
    shapes: tuple[Literal["0.5B", "1.5B", "8B"], ...] = ("1.5B", "8B")
    """Heads of which model; 0.5B has heads of 64, so FlashInfer compiles once more for it."""
    json: str | None = None
    """Write the figures to this file."""


def prefill_cases() -> Iterator[Rows]:
    """From the first prompt to chunks behind a long prefix, and steps that also decode."""
    for length in (128, 512, 2048, 8192):
        yield Rows(f"1 x {length}", (length,), (length,))
    yield Rows("16 x 512", (512,) * 16, (512,) * 16)
    yield Rows("64 x 512", (512,) * 64, (512,) * 64)
    yield Rows("4 x 2048 behind 2048", (2048,) * 4, (4096,) * 4)
    yield Rows("1 x 2048 behind 14336", (2048,), (16384,))
    yield Rows("64 x 16 behind 512", (16,) * 64, (528,) * 64)
    yield Rows("8 x 512, 256 decode", (512,) * 8 + (1,) * 256, (512,) * 8 + (1024,) * 256)


def decode_cases() -> Iterator[tuple[str, Rows]]:
    """The shapes and contexts that FlashInfer was measured at before, and rows alone."""
    for own in (64, 512, 1023):
        yield "1.5B", decode_rows(64, 16, 512, own)
    yield "1.5B", decode_rows(64, 16, 1024, 512)
    for own in (64, 256, 511):
        yield "8B", decode_rows(16, 16, 512, own)
    yield "1.5B", decode_rows(1, 1, 0, 640)
    yield "8B", decode_rows(1, 1, 0, 640)
    yield "1.5B", decode_rows(64, 1, 0, 1024)
    yield "1.5B", decode_rows(16, 1, 0, 4096)
    yield "8B", decode_rows(64, 1, 0, 1024)


def captured_names(options: Options) -> list[BackendName]:
    """Back ends of decode: FlashInfer's is fa2."""
    return [name for name in options.backends if name != "fa3"]


def layered(step: Any, qkv: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """One call attends once, each time on the next layer."""
    calls = iter(range(1 << 30))
    return lambda: attend(step, next(calls) % LAYERS, *qkv)


def host_us(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median microseconds of the host in `call`, with an idle GPU."""
    spent = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        spent.append(time.perf_counter() - started)
    return 1e6 * statistics.median(spent)


def check(options: Options) -> list[dict[str, Any]]:
    """Every back end against the reference, on odd lengths."""
    steps = [
        Rows("prefill", (63, 100, 17), (63, 100, 17)),
        Rows("behind prefixes", (63, 5, 130), (80, 700, 131)),
        Rows("mixed", (1, 70, 1, 33), (40, 70, 1, 100)),
        Rows("decode", (1,) * 5, (1, 16, 17, 100, 333)),
        decode_rows(2, 4, 64, 37),
    ]
    found = []
    for shape in (SHAPES[name] for name in options.shapes):
        for rows in steps:
            setup = Setup(shape, rows)
            qkv = setup.qkv()
            for name in options.backends:
                out = attend(setup.backend(name).prepare(setup.batch()), 0, *qkv)
                assert_close(f"{shape.name} {rows.name} {name}", out, setup.want(qkv[0]), DTYPE)
                found.append({"shape": shape.name, "rows": rows.name, "backend": name})
            if max(rows.query_lens) == 1:
                found += _check_captured(setup, qkv, captured_names(options))
    print(f"check: {len(found)} cases equal the float32 reference")
    return found


def _check_captured(
    setup: Setup, qkv: tuple[torch.Tensor, ...], names: list[BackendName]
) -> list[dict[str, Any]]:
    for name in names:
        layout, slots, lens = setup.layout()
        captured = setup.backend(name).capture_decode(layout)
        captured.refresh(slots, lens)
        graph = torch.cuda.CUDAGraph()
        attend(captured.step, 0, *qkv)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = attend(captured.step, 0, *qkv)
        captured.refresh(slots, lens)
        graph.replay()
        assert_close(f"captured {name}", out, setup.want(qkv[0]), DTYPE)
    row = {"shape": setup.shape.name, "rows": setup.rows.name}
    return [row | {"backend": f"captured {name}"} for name in names]


def prefill(options: Options) -> list[dict[str, Any]]:
    """Microseconds and TFLOP/s of one layer."""
    found = []
    print(
        f"\nprefill, us a layer (TFLOP/s)\n{'':34}" + "".join(f"{b:>18}" for b in options.backends)
    )
    for shape in (SHAPES[name] for name in options.shapes):
        for rows in prefill_cases():
            setup = Setup(shape, rows)
            qkv = setup.qkv()
            times = {}
            for name in options.backends:
                step = setup.backend(name).prepare(setup.batch())
                times[name] = time_us(layered(step, qkv), graph=True)
            rate = {name: setup.flops() / us / 1e6 for name, us in times.items()}
            cells = "".join(f"{times[n]:>10.1f} ({rate[n]:>5.0f})" for n in options.backends)
            print(f"{shape.name:<6}{rows.name:<28}{cells}", flush=True)
            found.append({"shape": shape.name, "rows": rows.name, "us": times, "tflops": rate})
            del setup, qkv
            torch.cuda.empty_cache()
    return found


def decode(options: Options) -> list[dict[str, Any]]:
    """Microseconds of one layer in a graph, against the KV bytes at 3.0 TB/s."""
    found = []
    names = captured_names(options)
    head = "".join(f"{n:>10}" for n in names)
    print(f"\ndecode, us a layer{'':18}{head}  KV at 3 TB/s  shared KV once")
    for shape_name, rows in decode_cases():
        if shape_name not in options.shapes:
            continue
        setup = Setup(SHAPES[shape_name], rows)
        qkv = setup.qkv()
        layout, slots, lens = setup.layout()
        times = {}
        for name in names:
            captured = setup.backend(name).capture_decode(layout)
            captured.refresh(slots, lens)
            attend(captured.step, 0, *qkv)
            captured.refresh(slots, lens)
            times[name] = time_us(layered(captured.step, qkv), graph=True)
        floors = [setup.kv_bytes(share=share) / 3e6 for share in (False, True)]
        cells = "".join(f"{times[n]:>10.1f}" for n in names)
        print(
            f"{shape_name:<6}{rows.name:<28}{cells}{floors[0]:>14.1f}{floors[1]:>16.1f}", flush=True
        )
        found.append({"shape": shape_name, "rows": rows.name, "us": times, "floors_us": floors})
        del setup, qkv, captured, layout
        torch.cuda.empty_cache()
    return found


def plan(options: Options) -> list[dict[str, Any]]:
    """Host microseconds to prepare a step; of a captured one also its page tables alone."""
    found = []
    print("\nhost, us a step")
    for rows in (
        decode_rows(64, 16, 512, 512),
        decode_rows(16, 16, 512, 256),
        decode_rows(1, 1, 0, 640),
        Rows("16 x 512", (512,) * 16, (512,) * 16),
        Rows("1 x 8192", (8192,), (8192,)),
    ):
        setup = Setup(SHAPES["1.5B"], rows, layers=1)
        figures = _refresh_us(setup, options) if max(rows.query_lens) == 1 else {}
        for name in options.backends:
            figures[f"prepare {name}"] = _prepare_us(setup.backend(name), setup.batch())
        print(f"  {rows.name:<26}" + ", ".join(f"{k} {v:.0f}" for k, v in figures.items()))
        found.append({"rows": rows.name, "us": figures})
    return found


def _prepare_us(backend: Any, batch: AttentionBatch) -> float:
    backend.prepare(batch)
    return host_us(lambda: backend.prepare(batch), 10)


def _refresh_us(setup: Setup, options: Options) -> dict[str, float]:
    """Before a replay, with rows of lengths that differ by a few tokens."""
    layout, slots, lens = setup.layout()
    spread = lens - np.arange(len(lens), dtype=np.int32) % 8
    figures = {"tables": host_us(lambda: paged_rows(setup.table, slots, spread, PAGE))}
    for name in captured_names(options):
        captured = setup.backend(name).capture_decode(layout)
        captured.refresh(slots, lens)
        figures[f"refresh {name}"] = _refresh_of(captured, slots, spread)
    return figures


def _refresh_of(captured: Any, slots: np.ndarray, lens: np.ndarray) -> float:
    return host_us(lambda: captured.refresh(slots, lens))


def invariance(options: Options) -> list[dict[str, Any]]:
    """Whether a row's bits depend on its batch, and on the chunks it was computed in."""
    found = []
    print("\nbitwise: a row alone and in its batch; the last half of a row as a chunk and whole")
    for name in options.backends:
        many = Rows(
            "16 rows",
            tuple(300 + 13 * i for i in range(16)),
            tuple(300 + 13 * i for i in range(16)),
        )
        in_batch = _same_alone(name, many, row=5)
        decode_batch = _same_alone(name, replace(decode_rows(40, 1, 0, 700)), row=5)
        chunked = _same_chunked(name, total=1000, chunk=437)
        print(f"  {name:<8} prefill {in_batch}, decode {decode_batch}, chunk {chunked}")
        found.append(
            {"backend": name, "prefill": in_batch, "decode": decode_batch, "chunk": chunked}
        )
    return found


def _same_alone(name: BackendName, rows: Rows, row: int) -> bool:
    setup = Setup(SHAPES["1.5B"], rows, layers=1)
    qkv = setup.qkv()
    whole = attend(setup.backend(name).prepare(setup.batch()), 0, *qkv)
    tokens = slice(int(setup.starts[row]), int(setup.starts[row + 1]))
    batch = setup.batch()
    alone = replace(
        batch,
        query_start_R1=np.array([0, batch.query_lens_R[row]]),
        kv_lens_R=batch.kv_lens_R[row : row + 1],
        slots_R=batch.slots_R[row : row + 1],
        write_slots_T=batch.write_slots_T[tokens],
    )
    out = attend(setup.backend(name).prepare(alone), 0, *(x[tokens] for x in qkv))
    return bool(torch.equal(out, whole[tokens]))


def _same_chunked(name: BackendName, total: int, chunk: int) -> bool:
    setup = Setup(SHAPES["1.5B"], Rows("chunked", (total,), (total,)), layers=1)
    qkv = setup.qkv()
    whole = attend(setup.backend(name).prepare(setup.batch()), 0, *qkv)
    last = replace(
        setup.batch(),
        query_start_R1=np.array([0, chunk]),
        write_slots_T=setup.write_slots[-chunk:],
    )
    out = attend(setup.backend(name).prepare(last), 0, *(x[-chunk:] for x in qkv))
    return bool(torch.equal(out, whole[-chunk:]))


PARTS: dict[Part, Callable[[Options], list[dict[str, Any]]]] = {
    "check": check,
    "prefill": prefill,
    "decode": decode,
    "plan": plan,
    "invariance": invariance,
}


def main() -> int:
    """Run the parts; 1 if one failed."""
    options = tyro.cli(Options)
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU; torch sees none")
        return 1
    torch.manual_seed(0)
    print(f"{describe()}, torch {torch.__version__}")
    report: dict[str, Any] = {"machine": describe(), "torch": torch.__version__}
    failed = []
    for part in options.parts:
        started = time.perf_counter()
        try:
            report[part] = PARTS[part](options)
        except Exception:
            traceback.print_exc()
            failed.append(part)
        print(f"[{part}: {time.perf_counter() - started:.1f} s]", flush=True)
        torch.cuda.empty_cache()
    if options.json:
        report["options"] = {k: v for k, v in asdict(options).items() if k != "json"}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
