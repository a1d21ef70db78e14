"""Mixtures of experts (Shazeer et al., 2017): which experts a token goes to, and what they give.

T tokens, N experts of the model, K experts of a token, H hidden width, I inner width, J = 2 I;
S slots for experts on this rank.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.moe import reference, route_reference
from kernels.moe.types import Routed
from kernels.norm import rms_norm
from kernels.routing import RoutingRule

__all__ = ["Routed", "RoutingRule", "norm_and_route", "route", "run_experts"]


def route(
    x_TH: torch.Tensor,
    gate_NH: torch.Tensor,
    rule: RoutingRule,
    *,
    bias_N: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    backend: KernelBackend,
) -> Routed:
    """The experts of every token and their weights, by `rule`.

    x_TH: float32, bfloat16 or float16; gate_NH: the router's weight, of that dtype, contiguous.
    bias_N: float32, added to the scores that experts are chosen by, and to no weight.
    num_rows: int32 [1] on the device of x; rows from there on only fill a graph: their ids are -1,
    their weights 0. Without it every row is a token.
    A token whose scores are NaN goes to valid experts with weights of NaN.
    Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return route_reference.route(x_TH, gate_NH, rule, bias_N, num_rows)
    if backend == "triton":
        from kernels.moe import route_triton

        return route_triton.route(x_TH, gate_NH, rule, bias_N, num_rows)
    raise unknown_backend(backend)


def norm_and_route(
    total_TH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    gate_NH: torch.Tensor,
    rule: RoutingRule,
    *,
    bias_N: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    backend: KernelBackend,
) -> tuple[torch.Tensor, Routed]:
    """`x = rms_norm(total)`, weighted when it is rounded, and `route(x)`: both, x [T, H]. Of one
    row or two in as many kernels as the route alone has.

    norm_weight_H: in the dtype of total. The rest: see `rms_norm` and `route`.
    """
    if backend == "triton":
        from kernels.moe import route_triton

        args = (total_TH, norm_weight_H, eps, gate_NH, rule, bias_N, num_rows)
        return route_triton.norm_and_route(*args)
    x_TH = rms_norm(total_TH, norm_weight_H, eps, backend=backend)
    routed = route(x_TH, gate_NH, rule, bias_N=bias_N, num_rows=num_rows, backend=backend)
    return x_TH, routed


def run_experts(
    x_TH: torch.Tensor,
    gate_up_SJH: torch.Tensor,
    down_SHI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    first_slot: int = 0,
    added_TH: torch.Tensor | None = None,
    residual_TH: torch.Tensor | None = None,
    num_experts: int | None = None,
    backend: KernelBackend,
) -> torch.Tensor:
    """Every token through its experts: the sum of `weight * down(silu(gate(x)) * up(x))`.

    x_TH: float32, bfloat16 or float16, as the weights. gate_up_SJH: an expert's rows of gate, then
    those of up; contiguous, as are down_SHI, ids_TK and weights_TK.
    ids_TK: int32. Slot s holds expert `first_slot + s`; experts that no slot holds, and ids of -1,
    add nothing and read no weight. weights_TK: float32 or the dtype of x.
    added_TH: a shared expert's output, added to the sum; residual_TH: what that is added to; both
    in the dtype of x, rows may be strided.
    num_experts: of the model, where this rank does not hold all; it says how products are cut.
    Products are summed in float32. They are rounded to the dtype of x after gate and up, after
    silu, after the product of both, and after down; the product with a weight is rounded to the
    wider of both dtypes. The sum over a token's experts runs in float32 in the order of ids_TK and
    is rounded once, as each of the two additions is. Returns [T, H] in the dtype of x.
    Raises ValueError on an unknown backend.
    """
    if backend == "torch":
        return reference.run_experts(
            x_TH, gate_up_SJH, down_SHI, ids_TK, weights_TK, first_slot, added_TH, residual_TH
        )
    if backend == "triton":
        from kernels.moe import triton

        args = (x_TH, gate_up_SJH, down_SHI, ids_TK, weights_TK, first_slot, added_TH, residual_TH)
        return triton.run_experts(*args, num_experts)
    raise unknown_backend(backend)
