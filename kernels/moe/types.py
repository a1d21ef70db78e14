"""What a router gives. T tokens, K experts of a token."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routed(NamedTuple):
    """Where tokens go.

    ids_TK: int32, experts of the whole model from the highest score down; -1 for none.
    weights_TK: what their outputs are multiplied by, float32 or the dtype of the tokens.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
