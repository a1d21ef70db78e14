"""What `attention_decode.py --parts launches whole rule` tries: launches of the kernels, and from
which size another kernel pays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from typing import Any

from attention_decode_cases import (
    LARGE,
    MIDDLE,
    SMALL,
    TIMED,
    TINY,
    Bench,
    Case,
    on_device,
    time_us,
)

from engine.config import KVDType
from kernels.attention.grouped import Launch, shared_states
from kernels.attention.tiles import TILE_ROWS
from kernels.attention.whole import whole_rows

LAUNCHES = [
    Launch(128, 8, 2),
    Launch(128, 8, 3),
    Launch(128, 8, 1),
    Launch(64, 4, 2),
    Launch(64, 4, 3),
    Launch(64, 4, 1),
    Launch(64, 8, 2),
    Launch(32, 4, 2),
    Launch(32, 4, 3),
]
WHOLE = [(4, 2), (4, 3), (4, 1), (2, 2), (8, 2)]
"""Warps and stages of a program that takes a whole row."""


def attempt(run: Callable[[], Any]) -> Any:
    """What `run` returns; None, with the error in one line, where it cannot run."""
    try:
        return run()
    except Exception as error:
        print(f"  {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return None


def run_whole(bench: Bench, states: Any, warps: int, stages: int, layer: int) -> None:
    whole_rows(bench.call(layer), states, num_warps=warps, num_stages=stages)


def compile_all(kv_dtype: KVDType = "auto") -> None:
    """Fill Triton's cache from several processes: one alone compiles for minutes."""
    models = (SMALL, LARGE, MIDDLE, TINY)
    jobs = [(model, launch, kv_dtype) for model in models for launch in [*LAUNCHES, *WHOLE]]
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs))


def compile_one(job: tuple[Any, Any, KVDType]) -> None:
    """Run one launch once on a batch of two rows."""
    model, launch, kv_dtype = job
    bench = Bench(Case(model, 1, 2, 128, 16), 1, kv_dtype)
    if isinstance(launch, Launch):
        attempt(partial(bench.grouped, 0, launch))
        return
    call = bench.call(0)
    known = (bench.tiles.tokens_R, *shared_states(call, bench.tiles))
    for states in (None, known):
        attempt(partial(run_whole, bench, states, *launch, 0))


def tune_launches(kv_dtype: KVDType = "auto") -> list[dict[str, Any]]:
    """The shared part alone by launch, then the rest by warps and stages."""
    rows = []
    for case in (TIMED[0], TIMED[3], TIMED[4], TIMED[7], Case(TINY, 128, 8, 512, 64)):
        bench = on_device(case, kv_dtype)
        group = case.model.heads // case.model.kv_heads
        for launch in LAUNCHES:
            run = partial(bench.shared_part, launch=launch)
            us = attempt(partial(time_us, run, bench.layers))
            used = min(TILE_ROWS * group, launch.height // group * group)
            rows.append({"case": str(case), "launch": asdict(launch), "us": us})
            print(f"{case!s:<28}{launch!s:<20}{used:>4} used {us or -1.0:>8.1f} us")
        call = bench.call(0)
        known = (bench.tiles.tokens_R, *shared_states(call, bench.tiles))
        for warps, stages in ((4, 2), (4, 3), (4, 1), (2, 2), (8, 2)):
            for label, states in (("rest", known), ("whole", None)):
                run = partial(run_whole, bench, states, warps, stages)
                us = attempt(partial(time_us, run, bench.layers))
                rows.append({"case": str(case), "rest": label, "launch": [warps, stages], "us": us})
                print(f"{case!s:<28}{label} {warps} warps {stages} stages {us or -1.0:>8.1f} us")
        del bench, call, known
    return rows


def small_groups() -> Iterator[Case]:
    """About as many bytes saved as the rule asks for, in many groups or few, and far less."""
    for groups, samples, shared in (
        *((64, 16, 256), (32, 16, 256), (32, 16, 512), (16, 16, 512), (16, 16, 1024)),
        *((64, 8, 512), (64, 4, 512), (128, 8, 512), (256, 4, 512), (512, 2, 512), (8, 64, 512)),
    ):
        for own in (64, 512):
            yield Case(SMALL, groups, samples, shared, own)
    for groups, samples, shared in (
        *((16, 16, 256), (8, 16, 512), (8, 16, 1024), (4, 16, 1024), (4, 16, 2048)),
        *((16, 8, 512), (32, 8, 512), (32, 4, 512), (64, 4, 512), (2, 64, 1024), (1, 64, 3072)),
    ):
        for own in (64, 256):
            yield Case(LARGE, groups, samples, shared, own)
    yield Case(SMALL, 0, 1, 0, 512, loners=1024)
    yield Case(SMALL, 32, 16, 512, 64, loners=512)


def tune_rule(kv_dtype: KVDType = "auto") -> list[dict[str, Any]]:
    """From which size groups pay, against the better of whole rows and splits."""
    rows = []
    print(f"{'case':<28}{'saved MB':>9}{'splits':>8}{'whole':>8}{'grouped':>9}{'gain':>7}")
    for case in small_groups():
        bench = on_device(case, kv_dtype)
        splits = time_us(partial(bench.plain, whole=False), bench.layers)
        whole = time_us(partial(bench.plain, whole=True), bench.layers)
        grouped = time_us(bench.grouped, bench.layers)
        row = {"case": str(case), "splits_us": splits, "whole_us": whole, "grouped_us": grouped}
        saved = case.saved_bytes / 1e6
        rows.append({**row, "saved_mb": saved})
        gain = min(splits, whole) / grouped
        print(f"{case!s:<28}{saved:>9.0f}{splits:>8.1f}{whole:>8.1f}{grouped:>9.1f}{gain:>7.2f}")
        del bench
    return rows


def tune_whole(kv_dtype: KVDType = "auto") -> list[dict[str, Any]]:
    """Rows that share nothing: one program for a row and kv head, or for each split."""
    rows = []
    print(f"{'case':<28}{'splits':>8}{'whole':>8}{'GB/s':>8}")
    for model in (SMALL, LARGE):
        for programs in (64, 128, 192, 256, 384, 512, 1024):
            for length in (512, 1024, 2048):
                case = Case(model, 0, 1, 0, length, loners=programs // model.kv_heads)
                bench = on_device(case, kv_dtype)
                splits = time_us(partial(bench.plain, whole=False), bench.layers)
                whole = time_us(partial(bench.plain, whole=True), bench.layers)
                rows.append({"case": str(case), "splits_us": splits, "whole_us": whole})
                best = case.kept_bytes(kv_dtype) / min(splits, whole) / 1e3
                print(f"{case!s:<28}{splits:>8.1f}{whole:>8.1f}{best:>8.0f}")
                del bench
    return rows
