"""Checks of one request before anything is spent on it. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import (
    ExpertFacts,
    IntArray,
    ReplicaState,
    Request,
    RouteDType,
    SamplingParams,
    Task,
    route_dtype,
)
from engine.protocol.types import FLOAT32_TINY, MAX_ALLOWED_IDS
from rollout.masks.base import banned_ids
from rollout.requests.message_ranges import check_ranges

_UNSIGNED = MappingProxyType({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64})
MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6
"""Times or divided into a logit, such a factor leaves it finite in float32."""

_SCORES_ONLY = (
    "this model can only classify: it is a sequence classifier without a language-model head; have "
    "it score texts (POST /classify, task 'classify'), or serve a ...ForCausalLM checkpoint"
)
_SCORES_NOTHING = (
    "this model can only generate and embed: it has no classification head; serve a "
    "...ForSequenceClassification checkpoint to score texts"
)
_OF_OUTPUTS: Mapping[str, Any] = MappingProxyType(
    {
        "top_logprobs": 0,
        "prompt_logprob_start": -1,
        "stream": False,
        "entropy": False,
        "logprob_ids": [],
        "output_ids": None,
        "hold_at": -1,
        "allowed_token_ids": None,
        "grammar": None,
        "logprob_law": "model",
        "draft_tokens": -1,
        "forced_acceptance": -1.0,
        "return_routed_experts": False,
        "routed_experts_start_len": 0,
    }
)
"""Fields that speak of logits over a vocabulary, and what each has to be where there are none."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica can serve at all. kv_tokens: tokens its whole KV pool holds. num_labels: of a
    classifier; 0 of a model that generates. draft_tokens: most that it drafts at once, 0 if it
    drafts nothing. forces: whether it was told to serve requests that force acceptance. experts,
    keeps_routes: as in `EngineFacts`."""

    context_length: int
    vocab_size: int
    kv_tokens: int
    num_labels: int = 0
    draft_tokens: int = 0
    forces: bool = False
    experts: ExpertFacts | None = None
    keeps_routes: bool = False


def limits_of(state: ReplicaState) -> Limits:
    """What the replica of that state can serve."""
    return Limits(
        context_length=state.context_length,
        vocab_size=state.vocab_size,
        kv_tokens=state.total_pages * state.page_size,
        num_labels=state.num_labels,
        draft_tokens=state.draft_tokens,
        forces=state.forces_acceptance,
        experts=state.experts,
        keeps_routes=state.keeps_routes,
    )


def check_request(request: Request, limits: Limits) -> None:
    """Raise InvalidRequest or ContextTooLong, naming the field, unless it can be served: numbers
    and lists lie in the ranges of the protocol's types, and `check_served` finds nothing."""
    _check_prompt(request, limits)
    check_ranges(request, skip=("sampling",))
    check_ranges(request.sampling)
    _check_meaning(request, limits)


def check_served(request: Request, limits: Limits) -> None:
    """`check_request` where all ranges were checked: what only the model knows (its vocabulary,
    its context), and what the ranges of types cannot say."""
    _check_prompt(request, limits)
    _check_meaning(request, limits)


def why_not(task: Task, num_labels: int) -> str:
    """Why a model with so many labels, 0 of one that generates, does not do a task, and what it can
    do; "" if it does."""
    if (task == "classify") == (num_labels > 0):
        return ""
    return _SCORES_ONLY if num_labels else _SCORES_NOTHING


def _check_meaning(request: Request, limits: Limits) -> None:
    _check_task(request, limits)
    if request.task != "generate":
        return
    _check_sampling(request.sampling, limits.vocab_size)
    _check_ids("stop_ids", request.stop_ids, limits.vocab_size)
    _check_ids("logprob_ids", request.logprob_ids, limits.vocab_size)
    prompt_len = len(request.prompt_ids)
    if not -1 <= request.prompt_logprob_start < prompt_len:
        _refuse(
            "prompt_logprob_start",
            f"is {request.prompt_logprob_start}; give a position in [0, {prompt_len}) or -1",
        )
    of_prompt = request.prompt_logprob_start >= 0 or request.return_routed_experts
    if request.sampling.max_new_tokens == 0 and not of_prompt:
        _refuse("max_new_tokens", "may be 0 only when prompt logprobs are asked for, or routes")
    if not 0 <= request.top_logprobs <= limits.vocab_size:
        _refuse("top_logprobs", f"is {request.top_logprobs}; give 0 to {limits.vocab_size}")
    _check_allowed(request, limits.vocab_size)
    check_continued(request, limits)
    _check_drafts(request, limits)
    _check_routes(request, limits)
    if request.seed < 0:
        _refuse("seed", f"is {request.seed}; give 0 to 2**63 - 1")


def _check_routes(request: Request, limits: Limits) -> None:
    if not request.return_routed_experts:
        return
    check_keeps_routes(limits)
    start = request.routed_experts_start_len
    known = len(request.prompt_ids)
    known += 0 if request.output_ids is None else len(request.output_ids)
    # Where a turn begins, the leader knows.
    if not 0 <= start <= known and not (request.session and start > 0):
        _refuse("routed_experts_start_len", f"is {start}; give a position in [0, {known}]")


def check_keeps_routes(engine: Limits | ReplicaState) -> None:
    """Raise InvalidRequest (`return_routed_experts`) where no routes can be returned."""
    field = "return_routed_experts"
    if engine.experts is None:
        _refuse(field, "asks for routes, and this model has no experts; leave it out")
    if not engine.keeps_routes:
        _refuse(
            field,
            "asks for routes, and this server keeps none; start it with "
            "--enable-return-routed-experts, or leave it out",
        )


def check_route_dtype(request: Request, dtype: RouteDType, experts: ExpertFacts | None) -> None:
    """Raise InvalidRequest (`routed_experts_dtype`) if the ids that `request` asks for do not all
    fit into `dtype`, with a number to spare for absent ones."""
    if not request.return_routed_experts or experts is None or dtype != "uint8":
        return
    if route_dtype(experts.num_experts).name != dtype:
        _refuse(
            "routed_experts_dtype",
            f"is uint8, which does not hold {experts.num_experts} experts; ask for uint16 or int32",
        )


def _check_allowed(request: Request, vocab_size: int) -> None:
    """Raise InvalidRequest unless something may come as the next output token, and so as any."""
    field, allowed = "allowed_token_ids", request.allowed_token_ids
    if allowed is None:
        return
    _check_tokens(field, allowed, vocab_size)
    if not 0 < len(allowed) <= MAX_ALLOWED_IDS:
        advice = "leave it out to allow every token" if len(allowed) == 0 else "allow fewer"
        _refuse(field, f"has {len(allowed)} tokens, of 1 to {MAX_ALLOWED_IDS}; {advice}")
    num_given = 0 if request.output_ids is None else len(request.output_ids)
    if np.isin(allowed, banned_ids(request, num_given)).all():
        _refuse(
            field,
            "allows only tokens that logit_bias or min_new_tokens rules out, so that nothing could "
            "be sampled; allow another",
        )


def _check_task(request: Request, limits: Limits) -> None:
    """Raise InvalidRequest, naming the field, unless the model does what the request is for, and
    a request to classify or to embed asks for nothing that only sampled tokens have."""
    task = request.task
    if reason := why_not(task, limits.num_labels):
        _refuse("task", f"is {task!r}, and {reason}")
    if task == "generate":
        return
    told = f"is of sampled tokens, and a request to {task} has none; leave it out"
    if request.sampling.stop:
        _refuse("stop", told)
    for field, neutral in _OF_OUTPUTS.items():
        value = getattr(request, field)
        if value is not None if neutral is None else value != neutral:
            _refuse(field, told)


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    if sampling.temperature < 0:
        _refuse("temperature", f"is {sampling.temperature}; give a number >= 0")
    if not FLOAT32_TINY <= sampling.top_p <= 1:
        _refuse("top_p", f"is {sampling.top_p}; give a number in (0, 1] that float32 holds")
    if not 0 <= sampling.min_p <= 1:
        _refuse("min_p", f"is {sampling.min_p}; give a number in [0, 1]")
    if sampling.top_k < -1 or sampling.top_k == 0:
        _refuse("top_k", f"is {sampling.top_k}; give a count >= 1, or -1 to turn it off")
    if not MIN_FACTOR <= sampling.repetition_penalty <= MAX_FACTOR:
        _refuse(
            "repetition_penalty",
            f"is {sampling.repetition_penalty}; give a number from {MIN_FACTOR} to {MAX_FACTOR}",
        )
    _check_lengths(sampling)
    _check_ids("logit_bias", list(sampling.logit_bias), vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids or [], vocab_size)


def _check_prompt(request: Request, limits: Limits) -> None:
    prompt = request.prompt_ids
    _check_tokens("prompt_ids", prompt, limits.vocab_size)
    if len(prompt) == 0:
        _refuse("prompt_ids", "is empty; give at least one token")
    # Whoever generates needs room for a token more.
    if len(prompt) >= limits.context_length + (request.task != "generate"):
        _refuse_length(len(prompt), f"a context of {limits.context_length}")
    if len(prompt) > limits.kv_tokens:
        _refuse_length(len(prompt), f"a KV pool of {limits.kv_tokens} tokens")


def check_continued(request: Request, limits: Limits) -> None:
    """Raise InvalidRequest or ContextTooLong unless the request, whose prompt and sampling
    parameters were found good, may go on from its `output_ids` and to its `hold_at`."""
    num_given = 0
    if request.output_ids is not None:
        _check_given(request, request.output_ids, limits)
        num_given = len(request.output_ids)
    if request.hold_at != -1 and request.hold_at <= num_given:
        _refuse(
            "hold_at",
            f"is {request.hold_at}; give more than the {num_given} tokens of output_ids, or -1",
        )


def _check_given(request: Request, given: IntArray, limits: Limits) -> None:
    _check_tokens("output_ids", given, limits.vocab_size)
    most = request.sampling.max_new_tokens
    if len(given) > most:
        _refuse("output_ids", f"has {len(given)} tokens, more than max_new_tokens, {most}")
    size = len(request.prompt_ids) + len(given)
    room = min(limits.context_length, limits.kv_tokens)
    if size > room:
        raise ContextTooLong(
            f"output_ids has {len(given)} tokens, which with a prompt of {len(request.prompt_ids)} "
            f"are too many for the {room} that this engine holds; they cannot be continued here",
            field="output_ids",
        )


def _check_drafts(request: Request, limits: Limits) -> None:
    count, most, forced = request.draft_tokens, limits.draft_tokens, request.forced_acceptance
    if not -1 <= count <= most:
        room = f"give 0 to {most}" if most else "this server drafts nothing, so give 0"
        _refuse("draft_tokens", f"is {count}; {room}, or -1 to leave it to the server")
    if forced == -1:
        return
    if not 0 <= forced <= 1:
        _refuse("forced_acceptance", f"is {forced}; give a probability in [0, 1], or -1 for none")
    if not limits.forces:
        _refuse(
            "forced_acceptance",
            "makes tokens that mean nothing, and this server was not started to serve it "
            "(--speculative with --allow-forced-acceptance); leave it out",
        )


def _check_tokens(field: str, ids: IntArray, vocab_size: int) -> None:
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        _refuse(field, "must be a one-dimensional array of integers")
    if not _within(ids, vocab_size):
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        _refuse(field, f"[{wrong[0]}] is {ids[wrong[0]]}; ids must lie in [0, {vocab_size})")


def _within(ids: IntArray, limit: int) -> bool:
    """Whether all lie in [0, limit): a negative number is a large one without its sign."""
    if not len(ids):
        return True
    if ids.dtype.kind == "i":
        ids = ids.view(_UNSIGNED[ids.itemsize])
    return int(np.maximum.reduce(ids)) < limit


def _check_lengths(sampling: SamplingParams) -> None:
    if sampling.max_new_tokens < 0:
        _refuse("max_new_tokens", f"is {sampling.max_new_tokens}; give at least 1")
    if sampling.min_new_tokens < 0:
        _refuse("min_new_tokens", f"is {sampling.min_new_tokens}; give at least 0")
    if sampling.min_new_tokens > sampling.max_new_tokens:
        _refuse(
            "min_new_tokens",
            f"is {sampling.min_new_tokens}, above max_new_tokens {sampling.max_new_tokens}",
        )


def _check_ids(field: str, ids: list[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            _refuse(field, f"holds token {token}; ids must lie in [0, {vocab_size})")


def _refuse(field: str, problem: str) -> None:
    raise InvalidRequest(f"{field} {problem}", field=field)


def _refuse_length(length: int, room: str) -> None:
    raise ContextTooLong(
        f"prompt_ids has {length} tokens, too many for {room}; shorten the prompt",
        field="prompt_ids",
    )
