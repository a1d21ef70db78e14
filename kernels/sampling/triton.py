"""Sampling on GPU: chunk sums of the whole vocabulary, the search, the rows with filters.

Shapes: S rows, V vocabulary, N chunks, L laws: S, and S more where there are masks.

Nothing here asks the device anything, so a step that samples can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton

from kernels.sampling.filters import Filters
from kernels.sampling.masks import TokenMasks, lowest_logit
from kernels.sampling.reference import CHUNK
from kernels.sampling.triton_draw import chunk_kernel, search_kernel
from kernels.sampling.triton_filters import filter_kernel
from kernels.sampling.triton_philox import philox_uniform

__all__ = ["philox_uniform", "sample"]

CHUNKS_PER_PROGRAM, CHUNK_WARPS = 8, 4
FILTER_CHUNKS, FILTER_WARPS = 16, 16
# Low bits that are zero in every value of the type once it is a float32.
_SPARE_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


def sample(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    seed_S: torch.Tensor,
    position_S: torch.Tensor,
    filters: Filters,
    entropy_S: torch.Tensor | None,
    masks: TokenMasks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.sampling.sample`."""
    num_rows, vocab = logits_SV.shape
    token_S = torch.empty(num_rows, dtype=torch.int64, device=logits_SV.device)
    logprob_S = torch.empty(num_rows, dtype=torch.float32, device=logits_SV.device)
    if num_rows == 0:
        return token_S, logprob_S
    if logits_SV.stride(1) != 1:
        logits_SV = logits_SV.contiguous()
    rows = (logits_SV, temperature_S.float(), seed_S, position_S)
    num_laws = num_rows if masks is None else 2 * num_rows
    chunk_max_LN = torch.empty(num_laws, triton.cdiv(vocab, CHUNK), device=logits_SV.device)
    chunk_sum_LN = torch.empty_like(chunk_max_LN)
    chunk_moment_SN = None if entropy_S is None else torch.empty_like(chunk_max_LN[:num_rows])
    chunks = (chunk_max_LN, chunk_sum_LN)
    _launch_chunks(rows, chunks, chunk_moment_SN, masks)
    search_kernel[(num_rows,)](
        *rows,
        *chunks,
        chunk_moment_SN,
        token_S,
        logprob_S,
        entropy_S,
        *_sizes(logits_SV, chunk_max_LN),
        *_mask_arguments(masks),
        LOWEST=lowest_logit(logits_SV.dtype),
        C=CHUNK,
        N=triton.next_power_of_2(chunk_max_LN.shape[1]),
    )
    if any(values_S is not None for values_S in filters):
        own = (chunk_max_LN[:num_rows], chunk_sum_LN[:num_rows])
        _launch_filters(rows, filters, own, (token_S, logprob_S))
    return token_S, logprob_S


def _sizes(logits_SV: torch.Tensor, chunk_max_SN: torch.Tensor) -> tuple[int, int, int]:
    return logits_SV.stride(0), logits_SV.shape[1], chunk_max_SN.shape[1]


def _mask_arguments(
    masks: TokenMasks | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    if masks is None:
        return None, None, 0
    return masks.mask_S, masks.bits_MB, masks.bits_MB.shape[1]


def _launch_chunks(
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    chunks: tuple[torch.Tensor, torch.Tensor],
    chunk_moment_SN: torch.Tensor | None,
    masks: TokenMasks | None,
) -> None:
    logits_SV, temperature_S, _, _ = rows
    num_chunks = chunks[0].shape[1]
    chunk_kernel[(logits_SV.shape[0], triton.cdiv(num_chunks, CHUNKS_PER_PROGRAM))](
        logits_SV,
        temperature_S,
        *chunks,
        chunk_moment_SN,
        *_sizes(logits_SV, chunks[0]),
        *_mask_arguments(masks),
        LOWEST=lowest_logit(logits_SV.dtype),
        C=CHUNK,
        CHUNKS=CHUNKS_PER_PROGRAM,
        num_warps=CHUNK_WARPS,
    )


def _launch_filters(
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    filters: Filters,
    chunks: tuple[torch.Tensor, torch.Tensor],
    outputs: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits_SV, (chunk_max_SN, _) = rows[0], chunks
    listed_SN, tied_SN = (torch.empty_like(chunk_max_SN, dtype=torch.int32) for _ in range(2))
    filter_kernel[(logits_SV.shape[0],)](
        *rows,
        *filters,
        *chunks,
        listed_SN,
        torch.empty_like(chunk_max_SN),
        tied_SN,
        *outputs,
        *_sizes(logits_SV, chunk_max_SN),
        SHIFT=_SPARE_BITS[logits_SV.dtype],
        B=FILTER_CHUNKS,
        C=CHUNK,
        N=triton.next_power_of_2(chunk_max_SN.shape[1]),
        num_warps=FILTER_WARPS,
    )
