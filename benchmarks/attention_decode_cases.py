"""Batches of prompt groups on a GPU, and how one layer's decode attention over them is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.attention.groups import GroupRule, SharedGroup, most_tiles, tile_groups
from engine.config import KVDType
from kernels.attention import SharedTiles
from kernels.attention.call import DecodeCall, decode_call
from kernels.attention.decode import decode_attention
from kernels.attention.grouped import Launch, shared_states
from kernels.attention.tiles import TILE_ROWS
from kernels.attention.whole import whole_rows
from kernels.quant.fp8_kv import KVScales, encode

PAGE = 16
RULE = GroupRule(unit=128, min_rows=2, min_tokens=128, tile_rows=TILE_ROWS, max_kv_len=4096)


@dataclass(frozen=True)
class Model:
    """Heads of one attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def token_bytes(self) -> int:
        return 2 * 2 * self.kv_heads * self.head_dim


SMALL, LARGE = Model("1.5B", 12, 2), Model("8B", 32, 8)
MIDDLE, TINY = Model("7B", 28, 4), Model("0.5B", 14, 2, 64)


@dataclass(frozen=True)
class Case:
    """`groups` groups of `samples` rows share `shared` tokens and go on for `own` more; then
    come `loners` rows that share nothing, of the same length."""

    model: Model
    groups: int
    samples: int
    shared: int
    own: int
    loners: int = 0

    def __str__(self) -> str:
        loners = f" + {self.loners}" if self.loners else ""
        return f"{self.model.name} {self.groups}x{self.samples}{loners}, {self.shared}+{self.own}"

    @property
    def rows(self) -> int:
        return self.groups * self.samples + self.loners

    @property
    def unique_bytes(self) -> int:
        alone = self.loners * (self.shared + self.own) + self.groups * self.samples * self.own
        return (alone + self.groups * self.shared) * self.model.token_bytes

    def kept_bytes(self, kv_dtype: KVDType) -> int:
        """`unique_bytes` as they are kept."""
        dim = self.model.head_dim
        return (
            self.unique_bytes if kv_dtype == "auto" else self.unique_bytes * (dim + 2) // (2 * dim)
        )

    @property
    def saved_bytes(self) -> int:
        rows = self.samples - RULE.tiles(self.samples)
        return self.groups * rows * self.shared * self.model.token_bytes


@dataclass
class Bench:
    """One case on the device: a page table, and KV pages for several layers."""

    case: Case
    layers: int
    kv_dtype: KVDType = "auto"
    out: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, model, device = self.case, self.case.model, "cuda"
        length = case.shared + case.own
        self.table = page_table(case).to(device)
        shape = (self.layers, int(self.table.max()) + 1, PAGE, model.kv_heads, model.head_dim)
        self.k, self.v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.scales: list[KVScales | None] = [None] * self.layers
        if self.kv_dtype != "auto":
            (self.k, k_scale), (self.v, v_scale) = encode(self.k), encode(self.v)
            pairs = (scale.transpose(2, 3).contiguous() for scale in (k_scale, v_scale))
            self.scales = [KVScales(*pair) for pair in zip(*pairs, strict=True)]
        self.q = torch.randn(case.rows, model.heads, model.head_dim, device=device).bfloat16()
        self.starts = torch.arange(case.rows + 1, device=device, dtype=torch.int32)
        self.kv_lens = torch.full((case.rows,), length, device=device, dtype=torch.int32)
        self.slots = torch.arange(case.rows, device=device, dtype=torch.int32)
        self.out = torch.empty_like(self.q)
        n, s = case.samples, case.shared // 128 * 128
        groups = [SharedGroup(g * n, g * n + n, s) for g in range(case.groups)] if s else []
        tiles = most_tiles(case.rows, RULE)
        packed = torch.from_numpy(tile_groups(groups, case.rows, RULE)).to(device)
        self.tiles = SharedTiles(packed[: 3 * tiles].view(tiles, 3), packed[3 * tiles :])

    def call(self, layer: int) -> DecodeCall:
        longest = self.case.shared + self.case.own
        rows = (self.slots, longest)
        return decode_call(*self._arguments(layer), *rows, scales=self.scales[layer])

    def _arguments(self, layer: int) -> tuple[Any, ...]:
        scale = self.case.model.head_dim**-0.5
        pages = (self.k[layer], self.v[layer], self.table)
        return (self.q, *pages, self.starts, self.kv_lens, scale, self.out)

    def plain(self, layer: int, whole: bool | None = None) -> None:
        longest = self.case.shared + self.case.own
        rows = (self.slots, longest)
        decode_attention(*self._arguments(layer), *rows, whole=whole, scales=self.scales[layer])

    def grouped(self, layer: int, launch: Launch | None = None) -> None:
        call = self.call(layer)
        whole_rows(call, (self.tiles.tokens_R, *shared_states(call, self.tiles, launch)))

    def shared_part(self, layer: int, launch: Launch | None = None) -> None:
        shared_states(self.call(layer), self.tiles, launch)

    def result(self, run: Callable[[int], None]) -> torch.Tensor:
        self.out.fill_(float("nan"))
        run(0)
        return self.out.clone()


def page_table(case: Case) -> torch.Tensor:
    """Pages in random order; the rows of a group hold the same ones in front."""
    front, columns = case.shared // PAGE, -(-(case.shared + case.own) // PAGE)
    grouped = case.groups * case.samples
    own = grouped * (columns - front) + case.loners * columns
    ids = torch.randperm(case.groups * front + own).int()
    table = torch.empty(case.rows, columns, dtype=torch.int32)
    first = ids[: case.groups * front].view(case.groups, front)
    table[:grouped, :front] = first.repeat_interleave(case.samples, 0)
    rest = ids[case.groups * front :]
    table[:grouped, front:] = rest[: grouped * (columns - front)].view(grouped, columns - front)
    table[grouped:] = rest[grouped * (columns - front) :].view(case.loners, columns)
    return table


def time_us(run: Callable[[int], None], layers: int, calls: int = 28) -> float:
    """Microseconds of a call: median of five replays of a graph of `calls` calls."""
    for layer in range(min(layers, 2)):
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            run(index % layers)
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def copy_gb_per_s() -> float:
    """Bytes read and written by a copy, per nanosecond."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy(_: int) -> None:
        target.copy_(source)

    us = time_us(copy, 1, calls=4)
    return 2 * source.numel() / us / 1e3


def on_device(case: Case, kv_dtype: KVDType = "auto") -> Bench:
    """With as many layers as make 300 MB, so that no call finds its KV in the cache."""
    layers = max(2, min(28, -(-300_000_000 // case.kept_bytes(kv_dtype))))
    return Bench(case, layers, kv_dtype)


TIMED = [
    Case(SMALL, 64, 16, 512, 64),
    Case(SMALL, 64, 16, 512, 512),
    Case(SMALL, 64, 16, 512, 1023),
    Case(SMALL, 64, 16, 1024, 512),
    Case(LARGE, 16, 16, 512, 64),
    Case(LARGE, 16, 16, 512, 256),
    Case(LARGE, 16, 16, 512, 511),
    Case(MIDDLE, 32, 8, 1024, 512),
    Case(SMALL, 32, 16, 512, 256, loners=512),
    Case(SMALL, 0, 1, 0, 1024, loners=1024),
    Case(SMALL, 0, 1, 0, 1024, loners=64),
]
