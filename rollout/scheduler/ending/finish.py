"""Why sequences end: the reasons that the scheduler itself gives."""

from __future__ import annotations

from engine.protocol import ErrorInfo, FinishReason
from rollout.scheduler.sequence import Sequence

NOT_FINITE = FinishReason(
    type="abort",
    message=(
        "the logits of this sequence are NaN or infinite, so it ends with the tokens sampled "
        "before; look at the weights published last, and at overflow: with --dtype float16 an "
        "activation beyond 65504 is infinite, where bfloat16 has the range of float32"
    ),
    error="NonFiniteLogits",
)

CANNOT_RESTART = FinishReason(
    type="abort",
    message=(
        "new weights came and kv_policy is 'fresh', but this request has streamed tokens or came "
        "with some, which it cannot take back; send it again, or choose 'recompute' or 'keep'"
    ),
    error="WeightUpdateError",
)


def failed(error: ErrorInfo) -> FinishReason:
    """Why a sequence ended that an error ended."""
    return FinishReason(
        type="abort", message=error.message, error=error.kind, field=error.field or None
    )


def finish_of(sequence: Sequence, matched: int, size: int, kv_tokens: int) -> FinishReason:
    """Why a running sequence ended with the step that was applied last.

    matched: the stop token that was sampled, -1 for none. size: its tokens, the prompt's among
    them. kv_tokens: tokens that the KV pool holds; a sequence that it does not hold fills it.
    """
    length = size - sequence.prompt_len
    if matched >= 0:
        return FinishReason(type="stop", matched=matched)
    if length >= sequence.max_new_tokens:
        return FinishReason(type="length", length=length)
    if size <= kv_tokens:
        return FinishReason(type="hold", length=length)
    return FinishReason(
        type="abort",
        message=f"the sequence fills the whole KV pool of {kv_tokens} tokens",
        error="OutOfMemory",
    )
