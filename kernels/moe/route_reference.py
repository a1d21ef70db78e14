"""Routing in plain torch.

T tokens, H hidden width, N experts, K experts of a token, G groups of experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.moe.types import Routed
from kernels.routing import RoutingRule

NO_EXPERT = -1
"""The id of no expert: of rows that only fill a graph."""
_LEAST_SUM = 1e-20
"""Added to a sum of weights before it divides; below half a unit of any that a softmax gives."""


def route(
    x_TH: torch.Tensor,
    gate_NH: torch.Tensor,
    rule: RoutingRule,
    bias_N: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
) -> Routed:
    """See `kernels.moe.route`."""
    if rule.wide_logits:
        logits_TN = F.linear(x_TH.float(), gate_NH.float())
    else:
        logits_TN = F.linear(x_TH, gate_NH).float()
    scores_TN = logits_TN.softmax(-1) if rule.score == "softmax" else logits_TN.sigmoid()
    ids_TK = _choose(scores_TN if bias_N is None else scores_TN + bias_N, rule)
    weights_TK = scores_TN.gather(1, ids_TK)
    if rule.normalised:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _LEAST_SUM)
    weights_TK = weights_TK * rule.scale
    if rule.rounded_weights:
        weights_TK = weights_TK.to(x_TH.dtype)
    ids_TK = ids_TK.int()
    if num_rows is not None:
        filling_T1 = (torch.arange(len(x_TH), device=x_TH.device) >= num_rows)[:, None]
        ids_TK = ids_TK.masked_fill(filling_T1, NO_EXPERT)
        weights_TK = weights_TK.masked_fill(filling_T1, 0.0)
    return Routed(ids_TK, weights_TK)


def _choose(choice_TN: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    """The ids of the best experts, [T, K], from what they are chosen by."""
    if rule.group_score != "none":
        groups_TGN = choice_TN.unflatten(1, (rule.num_groups, rule.num_experts // rule.num_groups))
        if rule.group_score == "max":
            best_TG = groups_TGN.amax(-1)
        else:
            best_TG = groups_TGN.topk(2, dim=-1).values.sum(-1)
        worse_TG = torch.ones_like(best_TG, dtype=torch.bool)
        worse_TG.scatter_(1, _highest(best_TG, rule.top_groups), False)
        choice_TN = groups_TGN.masked_fill(worse_TG[:, :, None], float("-inf")).flatten(1)
    return _highest(choice_TN, rule.top_k)


def _highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the highest of each row are, the first of equal ones first; torch.topk leaves that
    open."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
