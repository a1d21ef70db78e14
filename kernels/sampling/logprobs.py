"""Logprobs of given or likeliest tokens. S rows, V vocabulary, k or N tokens."""

from __future__ import annotations

import torch

from kernels.sampling.reference import split_temperature


def token_logprobs(
    logits_SV: torch.Tensor, token_S: torch.Tensor, temperature_S: torch.Tensor
) -> torch.Tensor:
    """log_softmax(logits / temperature)[token], float32 [S].

    token_S: int32 or int64; temperature_S: float32, below 1e-6 counts as 1. The float32
    copies of the logits take 2 * 4 * S * V bytes: callers with many rows go in pieces.
    """
    scaled_SV = _scaled(logits_SV, temperature_S)
    chosen_S = scaled_SV.gather(1, token_S.long().unsqueeze(1)).squeeze(1)
    return chosen_S - scaled_SV.logsumexp(-1)


def moved_logprobs(
    logits_SV: torch.Tensor,
    rows_M: torch.Tensor,
    temperature_M: torch.Tensor,
    token_M: torch.Tensor,
    *,
    known_M: torch.Tensor,
    logprob_M: torch.Tensor,
) -> torch.Tensor:
    """Logprobs of tokens in rows of which that of another token is known, float32 [M]: two logits a
    row are read, and no sum over the vocabulary is made again.

    rows_M: int64, rows of the S. token_M: int64, whose logprobs are wanted. known_M, logprob_M:
    int64 and float32, a token of each row and its logprob by `sample`. temperature_M: float32,
    below 1e-6 counts as 1. At least the lowest float32; where `logprob_M` is not finite, that.
    """
    _, divisor_M = split_temperature(temperature_M)
    gap_M = logits_SV[rows_M, token_M].double() - logits_SV[rows_M, known_M].double()
    moved_M = logprob_M.double() + gap_M / divisor_M.double()
    lowest = torch.finfo(torch.float32).min
    return torch.where(logprob_M.isfinite(), moved_M.clamp(min=lowest).float(), logprob_M)


def top_logprobs(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens of each row, likeliest first: int32 ids and float32 logprobs
    [S, k]. Logprobs as in `token_logprobs`."""
    if k == 0:
        nothing = logits_SV.new_empty((len(logits_SV), 0), dtype=torch.float32)
        return nothing.int(), nothing
    scaled_SV = _scaled(logits_SV, temperature_S)
    values_Sk, ids_Sk = scaled_SV.topk(k, dim=-1)
    return ids_Sk.int(), values_Sk - scaled_SV.logsumexp(-1, keepdim=True)


def named_logprobs(
    logits_SV: torch.Tensor, temperature_S: torch.Tensor, ids_SN: torch.Tensor
) -> torch.Tensor:
    """Logprobs of N tokens of each row, float32 [S, N]. ids_SN: int64, any N rows alike or not.
    Logprobs as in `token_logprobs`."""
    scaled_SV = _scaled(logits_SV, temperature_S)
    return scaled_SV.gather(1, ids_SN) - scaled_SV.logsumexp(-1, keepdim=True)


def _scaled(logits_SV: torch.Tensor, temperature_S: torch.Tensor) -> torch.Tensor:
    _, divisor_S = split_temperature(temperature_S)
    return logits_SV.float() / divisor_S.unsqueeze(1)
