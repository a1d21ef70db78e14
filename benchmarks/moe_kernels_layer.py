"""A layer of experts for `moe_kernels.py`: its tensors, ways to compute it, floors and checks.

T tokens, N experts, K experts of a token, H hidden width, I inner width; S slots on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import checkout  # noqa: F401
import torch
import torch.nn.functional as F

from kernels.activation import silu_mul
from kernels.moe import Routed, route, run_experts
from kernels.routing import RoutingRule

Call = Callable[[], Any]
BATCHES = 16
"""Batches of different tokens that a time is taken over, so that no cache holds their experts."""


@dataclass(frozen=True)
class Shape:
    """experts: of the model; slots: of this rank, the first experts."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    slots: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.inner * 2


SHAPES = [
    Shape("30B-A3B", 128, 8, 2048, 768, 128),
    Shape("30B-A3B, EP 2", 128, 8, 2048, 768, 64),
    Shape("30B-A3B, EP 4", 128, 8, 2048, 768, 32),
    Shape("30B-A3B, I 192", 128, 8, 2048, 192, 128),
]


@dataclass(frozen=True)
class Speed:
    """What bounds a card: bytes a microsecond of memory, products of 16 bits a microsecond."""

    bytes_us: float
    flops_us: float


def speed_of(card: str) -> Speed:
    """Measured on these cards: copies, and cuBLAS on large products."""
    return Speed(bytes_us=4.3e6 if "H200" in card else 3.0e6, flops_us=798e6)


class Layer:
    """Weights of one shape; routers of random weights spread tokens as trained ones do not: evenly,
    but for what chance does. skew: how much the first experts are preferred."""

    def __init__(self, shape: Shape, *, skew: float = 0.0) -> None:
        self.shape = shape
        generator = torch.Generator(device="cuda").manual_seed(0)

        def drawn(*size: int, scale: float = 1.0) -> torch.Tensor:
            tensor = torch.empty(size, device="cuda", dtype=torch.bfloat16)
            return tensor.normal_(generator=generator).mul_(scale)

        hidden, inner = shape.hidden, shape.inner
        self.rule = RoutingRule(
            num_experts=shape.experts, top_k=shape.top_k, normalised=True, rounded_weights=True
        )
        self.gate = drawn(shape.experts, hidden, scale=hidden**-0.5)
        self.gate_up = drawn(shape.slots, 2 * inner, hidden, scale=hidden**-0.5)
        self.down = drawn(shape.slots, hidden, inner, scale=inner**-0.5)
        self.skew = skew
        self._drawn = drawn

    def tokens(self, rows: int) -> torch.Tensor:
        """Rows; with a skew, all lean towards the first experts."""
        x = self._drawn(rows, self.shape.hidden)
        if self.skew:
            lean = self.gate[: self.shape.experts // 8].float().sum(0)
            x += (self.skew * lean).to(x.dtype)
        return x

    def route(self, x: torch.Tensor, **how: Any) -> Routed:
        return route(x, self.gate, self.rule, backend="triton", **how)

    def experts(self, x: torch.Tensor, routed: Routed, *, backend: Any = "triton") -> torch.Tensor:
        return run_experts(
            x,
            self.gate_up,
            self.down,
            *routed,
            residual_TH=x,
            num_experts=self.shape.experts,
            backend=backend,
        )

    def grouped(self, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        """By torch's grouped product, as transformers calls it; ids are those of slots."""
        ids, weights = routed
        slot_P, order_P = ids.flatten().sort(stable=True)
        counts = torch.histc(slot_P, bins=self.shape.slots, min=0, max=self.shape.slots - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        x_PH = x[order_P // self.shape.top_k]
        inner_PI = silu_mul(
            F.grouped_mm(x_PH, self.gate_up.transpose(1, 2), offs=ends), backend="triton"
        )
        down_PH = F.grouped_mm(inner_PI, self.down.transpose(1, 2), offs=ends)
        back_P = torch.empty_like(order_P)
        back_P[order_P] = torch.arange(len(order_P), device="cuda")
        weighted_TKH = down_PH[back_P].view(*ids.shape, -1) * weights[:, :, None]
        return x + weighted_TKH.sum(1)

    def hit(self, routed: Routed) -> int:
        """Experts of this rank that tokens go to."""
        ids = routed.ids_TK.unique()
        return int(((ids >= 0) & (ids < self.shape.slots)).sum())

    def floor_us(self, routed: Routed, speed: Speed) -> float:
        """Weights that must be read, or products that must be made, whichever takes longer."""
        ids = routed.ids_TK
        pairs = int(((ids >= 0) & (ids < self.shape.slots)).sum())
        products = 3 * pairs * 2 * self.shape.hidden * self.shape.inner
        read = self.hit(routed) * self.shape.expert_bytes
        return max(read / speed.bytes_us, products / speed.flops_us)


def check(layer: Layer, rows: int) -> Iterator[str]:
    """What is wrong: against the reference, when repeated, and when replayed from a graph, whose
    last rows come to be none."""
    name = f"{layer.shape.name}, {rows} rows" + (", skewed" if layer.skew else "")
    x = layer.tokens(rows)
    num_rows = torch.tensor([rows], dtype=torch.int32, device="cuda")

    def whole() -> tuple[torch.Tensor, ...]:
        routed = layer.route(x, num_rows=num_rows)
        return *routed, layer.experts(x, routed)

    ids, weights, out = whole()
    want = layer.experts(x, Routed(ids, weights), backend="torch")
    off = (out.float() - want.float()).abs() - 0.02 - 0.02 * want.float().abs()
    if rows and not float(off.max()) <= 0:
        yield f"{name}: differs from the reference, first at {(off > 0).nonzero()[0].tolist()}"
    if not all(torch.equal(a, b) for a, b in zip(whole(), (ids, weights, out), strict=True)):
        yield f"{name}: a repetition has other bits"
    if not rows:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = whole()
    graph.replay()
    if not all(torch.equal(a, b) for a, b in zip(replayed, (ids, weights, out), strict=True)):
        yield f"{name}: a replay has other bits"
    num_rows.fill_(rows // 2)
    graph.replay()
    if not torch.equal(replayed[2][: rows // 2], out[: rows // 2]):
        yield f"{name}: rows beside none have other bits"
    if not torch.equal(replayed[2][rows // 2 :], x[rows // 2 :]):
        yield f"{name}: rows that are none get something"
