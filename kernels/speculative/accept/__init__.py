"""Accepting drafts: the tokens that the target drew, as far as it drew what was drafted.

Shapes: R rows, K most drafts of a row, J = K + 1, V = R * J virtual rows.

A row of L tokens and drafts d_1 .. d_k has drawn t_0 .. t_k, t_j from its virtual row j by its
own seed at position L + j. t_0 always counts, and t_j does while d_1 .. d_j equal t_0 .. t_(j-1):
the very tokens of plain decoding, since all that virtual row j attended to has then come. A draft
that is given, and not drawn from a distribution, is so accepted with the target's probability of
it, which is what rejection sampling (Leviathan et al., arXiv 2211.17192) gets from it too.
"""

from __future__ import annotations

import torch

from kernels.backend import KernelBackend, unknown_backend
from kernels.speculative.accept import reference
from kernels.speculative.accept.reference import FORCED_SEED

__all__ = ["FORCED_SEED", "accept"]


def accept(
    tokens_V: torch.Tensor,
    slots_R: torch.Tensor,
    drafts_RK: torch.Tensor,
    drafted_R: torch.Tensor,
    *,
    length: torch.Tensor,
    limit: torch.Tensor,
    forced: torch.Tensor,
    token_ids: torch.Tensor,
    counts_R: torch.Tensor,
    backend: KernelBackend,
) -> None:
    """Append each row's accepted tokens to its sequence, in place.

    tokens_V: int64, drawn from the virtual rows of `kernels.speculative.rows`, contiguous.
    slots_R, drafts_RK (contiguous), drafted_R: int32, as that left them; drafts beyond `drafted`
    are not looked at. length, limit: int32 [slots]; token_ids: int32 [slots, context],
    contiguous; see `kernels.speculative`. `token_ids` gets the new tokens, that behind the context
    excepted, and `length` grows by how many came.
    counts_R: int32, filled: tokens that came, tokens_V[r * J : r * J + counts_R[r]]; 0 for an
    inert row, else 1 to drafted + 1, never more than `limit` leaves.
    forced: float32 [slots]. Where it is 0 or more, draft d_j counts as accepted with this
    probability instead, namely if philox_uniform(FORCED_SEED ^ slot, L + j) is below it: a tool
    of benchmarks. The tokens are still the t_j, and mean nothing.

    Raises ValueError on an unknown backend.
    """
    drafts = tokens_V, slots_R, drafts_RK, drafted_R
    tables = length, limit, forced, token_ids
    if backend == "torch":
        reference.accept(*drafts, *tables, counts_R)
    elif backend == "triton":
        from kernels.speculative.accept import triton

        triton.accept(*drafts, *tables, counts_R)
    else:
        raise unknown_backend(backend)
