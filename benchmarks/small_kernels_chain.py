"""The layers of a decode step without attention, and its small fused kernels, in time.

T tokens (one a row), E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from small_kernels_products import DTYPE, SHAPES, Best, Shape, pick, time_us

from kernels.activation import silu_mul
from kernels.embedding import embed_rms_norm
from kernels.kv_copy import write_kv
from kernels.linear import Options, new_counters
from kernels.linear.triton import with_config
from kernels.norm import add_rms_norm, rms_norm
from kernels.rotary import HeadNorms, KVTarget, apply_rotary
from kernels.rotary.store import rotate_and_store

HEADS = {"1.5B": (12, 2, False), "8B": (32, 8, True)}
LAYERS = 4
POSITIONS = 4096


@dataclass
class Layer:
    """Weights of one layer and the KV pages it writes."""

    weights: dict[str, torch.Tensor]
    norms: tuple[torch.Tensor, torch.Tensor]
    k_pages: torch.Tensor
    v_pages: torch.Tensor


class Chain:
    """`LAYERS` layers of one model, their attention left out: queries go to the output."""

    def __init__(self, model: str, rows: int, best: Best) -> None:
        self.heads, self.kv_heads, self.head_norm = HEADS[model]
        self.shapes = {
            shape.name.split()[1]: shape for shape in SHAPES if shape.name.startswith(model)
        }
        self.best, self.rows = best, rows
        hidden = self.shapes["o"].outs
        self.layers = [self._layer(hidden) for _ in range(LAYERS)]
        self.bias = _random(self.shapes["qkv"].features) if self.shapes["qkv"].bias else None
        self.total = _random(rows, hidden)
        self.positions = torch.randint(0, POSITIONS, (rows,), device="cuda")
        self.cos_sin = torch.rand(POSITIONS, 128, device="cuda")
        self.slots = torch.randperm(2048, device="cuda")[:rows]
        weights = torch.rand(2, 128, device="cuda", dtype=DTYPE) + 0.5
        self.norms = HeadNorms(weights[0], weights[1], 1e-6) if self.head_norm else None
        self.counters = new_counters(torch.device("cuda"))

    def _layer(self, hidden: int) -> Layer:
        names = ("qkv", "o", "gate_up", "down")
        shapes = {name: self.shapes[name] for name in names}
        return Layer(
            weights={n: _random(s.features, s.ins) * s.ins**-0.5 for n, s in shapes.items()},
            norms=(_random(hidden).abs() + 0.5, _random(hidden).abs() + 0.5),
            k_pages=torch.zeros(128, 16, self.kv_heads, 128, device="cuda", dtype=DTYPE),
            v_pages=torch.zeros(128, 16, self.kv_heads, 128, device="cuda", dtype=DTYPE),
        )

    @property
    def bytes(self) -> int:
        """Weight bytes of a layer."""
        return sum(weight.numel() * 2 for weight in self.layers[0].weights.values())

    def separate(self) -> torch.Tensor:
        """cuBLAS products between one kernel for each step."""
        hidden, residual = torch.zeros_like(self.total), self.total
        for layer in self.layers:
            normed, residual = add_rms_norm(
                hidden, residual, layer.norms[0], 1e-6, backend="triton"
            )
            qkv = F.linear(normed, layer.weights["qkv"], self.bias)
            q = self._rotated(layer, qkv)
            hidden = F.linear(q.flatten(1), layer.weights["o"])
            normed, residual = add_rms_norm(
                hidden, residual, layer.norms[1], 1e-6, backend="triton"
            )
            gated = silu_mul(F.linear(normed, layer.weights["gate_up"]), backend="triton")
            hidden = F.linear(gated, layer.weights["down"])
        return hidden + residual

    def _rotated(self, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = qkv.unflatten(-1, (-1, 128)).split(sizes, dim=1)
        if self.norms is not None:
            q = rms_norm(q, self.norms.q_weight_D, 1e-6, backend="triton")
            k = rms_norm(k, self.norms.k_weight_D, 1e-6, backend="triton")
        q, k = apply_rotary(q, k, self.positions, self.cos_sin, backend="triton")
        write_kv(k, v, layer.k_pages, layer.v_pages, self.slots, backend="triton")
        return q

    def fused(self, rotate: bool = True) -> torch.Tensor:
        """The kernels of this project; `rotate` off leaves the separate rotation and write."""
        total, base = self.total, Options(eps=1e-6, counters=self.counters)
        for layer in self.layers:
            options = replace(base, norm_weight_I=layer.norms[0], bias_O=self.bias)
            qkv = self._product(layer, "qkv", total, options)
            q = self._stored(layer, qkv) if rotate else self._rotated(layer, qkv)
            total = self._product(layer, "o", q.flatten(1), replace(base, residual_RO=total))
            options = replace(base, norm_weight_I=layer.norms[1], gated=True)
            gated = self._product(layer, "gate_up", total, options)
            total = self._product(layer, "down", gated, replace(base, residual_RO=total))
        return total

    def _stored(self, layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
        target = KVTarget(layer.k_pages, layer.v_pages, self.slots)
        return rotate_and_store(qkv, self.positions, self.cos_sin, target, self.norms)

    def _product(self, layer: Layer, name: str, x: torch.Tensor, options: Options) -> torch.Tensor:
        shape: Shape = self.shapes[name]
        config = pick(self.best, shape, self.rows)
        return with_config(x, layer.weights[name], options, config)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def table(best: Best, bandwidth: float) -> list[dict[str, Any]]:
    """Microseconds of a layer by each chain, and the bandwidth's floor."""
    out = []
    heads = ("separate", "fused, rotation apart", "fused", "floor")
    print(f"{'model':<6}{'rows':>5}" + "".join(f"{head:>23}" for head in heads))
    for model in HEADS:
        for rows in (1, 2, 4, 8, 16):
            chain = Chain(model, rows, best)
            _check(chain)
            times = {
                "separate": time_us([chain.separate] * 4) / LAYERS,
                "rotation_apart": time_us([lambda c=chain: c.fused(rotate=False)] * 4) / LAYERS,
                "fused": time_us([chain.fused] * 4) / LAYERS,
                "floor": chain.bytes / bandwidth * 1e6,
            }
            print(f"{model:<6}{rows:>5}" + "".join(f"{us:23.1f}" for us in times.values()))
            out.append({"model": model, "rows": rows, **times})
            del chain
            torch.cuda.empty_cache()
    return out


def _check(chain: Chain) -> None:
    """Fused is near the separate chain, and a graph of it gives its bits."""
    want, separate = chain.fused(), chain.separate()
    error = ((want - separate).double().norm() / separate.double().norm()).item()
    assert error < 0.03, f"the fused chain is {error:.3f} away"
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = chain.fused()
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, want), "a replay read what was not written yet"


def fused_kernels() -> list[dict[str, Any]]:
    """Rotation with norms and KV write, and embedding with norm, against their chains."""
    out = []
    print(f"{'kernel':<24}{'tokens':>7}{'separate':>10}{'heads per program: 1, 2, 4, 8':>34}")
    for model in HEADS:
        for rows in (1, 16, 256, 1024):
            chain = Chain.__new__(Chain)
            _rotation_only(chain, model, rows)
            layer, columns = chain.layers[0], (chain.heads + 2 * chain.kv_heads) * 128
            qkv = _random(rows, columns)
            apart = time_us([lambda c=chain, x=qkv, y=layer: c._rotated(y, x)] * 20)
            fused = [_rotation_us(chain, layer, qkv, block) for block in (1, 2, 4, 8)]
            cells = "".join(f"{us:8.2f}" for us in fused)
            print(f"{model + ' rotate and store':<24}{rows:>7}{apart:10.2f}  {cells}")
            out.append({"model": model, "rows": rows, "separate": apart, "fused": fused})
    for width in (1536, 4096):
        out += [_embedding(width, rows) for rows in (1, 1024)]
    return out


def _rotation_us(chain: Chain, layer: Layer, qkv: torch.Tensor, block: int) -> float:
    target = KVTarget(layer.k_pages, layer.v_pages, chain.slots)
    args = (qkv, chain.positions, chain.cos_sin, target, chain.norms)
    return time_us([lambda: rotate_and_store(*args, block_h=block)] * 20)


def _rotation_only(chain: Chain, model: str, rows: int) -> None:
    chain.heads, chain.kv_heads, chain.head_norm = HEADS[model]
    pages = torch.zeros(2, 128, 16, chain.kv_heads, 128, device="cuda", dtype=DTYPE)
    chain.layers = [Layer({}, (pages, pages), pages[0], pages[1])]
    chain.positions = torch.randint(0, POSITIONS, (rows,), device="cuda")
    chain.cos_sin = torch.rand(POSITIONS, 128, device="cuda")
    chain.slots = torch.randperm(2048, device="cuda")[:rows]
    weights = torch.rand(2, 128, device="cuda", dtype=DTYPE) + 0.5
    chain.norms = HeadNorms(weights[0], weights[1], 1e-6) if chain.head_norm else None


def _embedding(width: int, rows: int) -> dict[str, Any]:
    table, weight = _random(151936, width), _random(width)
    ids = torch.randint(0, 151936, (rows,), device="cuda")
    apart = time_us(
        [lambda: rms_norm(F.embedding(ids, table), weight, 1e-6, backend="triton")] * 20
    )
    fused = time_us([lambda: embed_rms_norm(ids, table, weight, 1e-6, backend="triton")] * 20)
    print(f"{f'embed {width} and norm':<24}{rows:>7}{apart:10.2f}  {fused:8.2f}")
    return {"kernel": f"embed {width}", "rows": rows, "separate": apart, "fused": fused}
