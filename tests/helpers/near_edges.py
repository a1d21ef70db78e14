"""Which draws float32 may decide either way: sums in another order move an edge past them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.logit_edits import edit_logits, edit_of
from engine.protocol import NewRow, Request
from kernels.sampling.filters import keep_mask
from kernels.sampling.philox import philox_uniform
from rollout.scheduler.encode import row_numbers
from rollout.scheduler.sequence import Sequence as Row

EDGE, GAP = 1e-6, 1e-5


@torch.no_grad()
def on_an_edge(model: Any, request: Request, output_ids: Sequence[int]) -> bool:
    """Whether the token after `output_ids` may be one or another: its uniform number is within
    EDGE of an edge of the distribution's cumulative sum or, if greedy, the two largest logits are
    within GAP. model: of transformers, float32."""
    known = torch.tensor([*request.prompt_ids.tolist(), *output_ids])
    logits_V = model(known[None]).logits[0, -1].float().clone()
    row = Row(
        request=request,
        arrival=0,
        group_order=0,
        numbers=row_numbers(request, 1 << 20),
        tokens=request.prompt_ids,
    )
    new = NewRow(
        slot=0,
        token_ids=request.prompt_ids,
        prompt_len=len(request.prompt_ids),
        sampling=row.row_sampling(),
    )
    edit = edit_of(new, torch.device("cpu"))
    if edit is not None:
        edit_logits(logits_V, known, edit)
    sampling = request.sampling
    if sampling.temperature < 1e-6:
        first, second = logits_V.topk(2).values.tolist()
        return first - second < GAP
    scaled_V = logits_V / np.float32(sampling.temperature)
    kept_V = keep_mask(
        scaled_V[None],
        torch.tensor([sampling.top_k]),
        torch.tensor([sampling.top_p], dtype=torch.float64),
        torch.tensor([sampling.min_p]),
    )[0]
    weights_V = scaled_V.double().softmax(-1) * kept_V
    edges_V = weights_V.cumsum(-1) / weights_V.sum()
    uniform = philox_uniform(torch.tensor([request.seed]), torch.tensor([len(known)]))
    return bool((edges_V - uniform).abs().min() < EDGE)
