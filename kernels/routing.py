"""How a router chooses experts and weighs them. Torch-free, so that a model's configuration can
name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """The arithmetic between a router's logits and the ids and weights of a token's experts.

    A token goes to the `top_k` experts of highest score, of equal ones to the lowest id first.
    score: of one expert, in float32, from the logits.
    normalised: weights are divided by the sum of the token's; before `scale`, which all are
        multiplied by.
    rounded_weights: weights are rounded to the dtype of the tokens; else they stay float32.
    wide_logits: logits are products in float32; else they are rounded to the dtype of the tokens.
    group_score: experts are chosen from the `top_groups` best of `num_groups` groups of neighbours,
        by each group's best score ("max", where the others score 0) or by the sum of its two best
        ("top2_sum", where the others score -inf); "none" chooses from all.

    Qwen2-MoE, Qwen3-MoE and OLMoE round their weights; Mixtral normalises them; DeepSeek-V2 and V3
    and GLM-4-MoE have wide logits, and the latter two sigmoids and a bias that chooses only.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = False
    rounded_weights: bool = False
    wide_logits: bool = False
    scale: float = 1.0
    group_score: Literal["none", "max", "top2_sum"] = "none"
    num_groups: int = 1
    top_groups: int = 1
