"""Why nothing can be drafted for a request."""

from __future__ import annotations

from engine.protocol import Request


def why_undrafted(request: Request) -> str:
    """The field of the native request that keeps its tokens from being drawn several at once, or ""
    if none does. Whoever shows a request's counts shows this beside them.

    Nothing but temperature and filters may stand between its logits and a token, since what
    penalties, bans and masks do to a position depends on the tokens before it; and no other
    tokens' logprobs may be wanted.
    """
    s = request.sampling
    found = {
        "draft_tokens": request.draft_tokens == 0,
        "frequency_penalty": s.frequency_penalty != 0,
        "presence_penalty": s.presence_penalty != 0,
        "repetition_penalty": s.repetition_penalty != 1,
        "logit_bias": bool(s.logit_bias),
        "min_new_tokens": s.min_new_tokens > 0,
        "top_logprobs_num": request.top_logprobs > 0,
        "token_ids_logprob": bool(request.logprob_ids),
        "allowed_token_ids": request.allowed_token_ids is not None,
        "grammar": request.grammar is not None,
    }
    return next((field for field, holds in found.items() if holds), "")
