"""What penalties, bias and bans do to the logits of a row before its draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.protocol import NewRow, RowSampling
from engine.transfer import to_device


@dataclass(frozen=True)
class LogitEdit:
    """What is done to the logits of one row before its draw, kept on the device while it runs.

    bias_ids, bias: int64 and float32 [B]; banned_ids: int64 [N], -inf until
    `sampling.min_new_tokens` were produced.
    """

    sampling: RowSampling
    prompt_len: int
    bias_ids: torch.Tensor
    bias: torch.Tensor
    banned_ids: torch.Tensor


def edit_logits(logits_V: torch.Tensor, token_ids: torch.Tensor, edit: LogitEdit) -> None:
    """Apply penalties, bias and bans to one row, in place.

    repetition_penalty divides positive and multiplies negative logits of every token seen in
    prompt or output (Keskar et al., CTRL, arXiv 1909.05858). frequency_penalty subtracts once
    per occurrence in the output, presence_penalty once for each token that occurs there (the
    OpenAI API's definition). `banned_ids` get -inf until `min_new_tokens` were produced.
    """
    params = edit.sampling
    if params.repetition_penalty != 1.0:
        seen = token_ids.unique()
        values = logits_V[seen]
        factor = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / factor, values * factor)
    output = token_ids[edit.prompt_len :]
    if len(output) and (params.frequency_penalty or params.presence_penalty):
        ids, counts = output.unique(return_counts=True)
        logits_V[ids] -= params.frequency_penalty * counts + params.presence_penalty
    if len(edit.bias_ids):
        logits_V[edit.bias_ids] += edit.bias.to(logits_V.dtype)
    if len(edit.banned_ids) and len(output) < params.min_new_tokens:
        logits_V[edit.banned_ids] = float("-inf")


def edit_of(row: NewRow, device: torch.device) -> LogitEdit | None:
    """The edit of a row that enters; None where its logits stay as they are."""
    params = row.sampling
    if not _edits_logits(params):
        return None
    bias = np.array(list(params.logit_bias.values()), np.float32)
    banned = params.banned_ids if params.min_new_tokens > 0 else []
    return LogitEdit(
        sampling=params,
        prompt_len=row.prompt_len,
        bias_ids=to_device(np.array(list(params.logit_bias), np.int64), device),
        bias=to_device(bias, device),
        banned_ids=to_device(np.array(banned, np.int64), device),
    )


def _edits_logits(params: RowSampling) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or bool(params.logit_bias)
        or (params.min_new_tokens > 0 and bool(params.banned_ids))
    )
