"""From one wire request to the sequences the engine samples."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from engine.errors import ContextTooLong, InvalidRequest
from engine.protocol import (
    GenerateRequest,
    Grammar,
    IntArray,
    Pooling,
    ReplicaState,
    Request,
    SamplingParams,
    Task,
)
from rollout.masks.grammar.requested import grammar_of
from rollout.requests.message_ranges import check_ranges
from rollout.requests.sample_ids import fresh_id, sample_id
from rollout.requests.seeds import derive_seed
from rollout.scheduler.validate import (
    check_continued,
    check_route_dtype,
    check_served,
    limits_of,
)
from rollout.text.detokenizer import stop_strings
from rollout.text.tokenizer import Tokenizer

_NO_GRAMMARS = (None, None, None, None)
MAX_TOP_ENTRIES = 1 << 22
"""Most entries of likeliest tokens of one call, held until its reply is written: an entry takes
some 200 bytes on the way, so 1 GiB."""


def expand(
    wire: GenerateRequest,
    tokenizer: Tokenizer | None,
    state: ReplicaState,
    default_seed: int,
    *,
    task: Task = "generate",
    pooling: Pooling = "last",
    decoded: bool = False,
) -> list[Request]:
    """The `n` requests that `wire` asks for, checked against what the replica can do.

    rid: the wire's, or a fresh one; when n > 1, those of its samples (`sample_ids`).
    Seeds: sample i has `derive_seed(base, i)` with the wire's `sampling_seed` as base, or
    `default_seed`; two requests without a seed need two default seeds to differ.
    Output tokens: those of `output_ids`, a list for each sample where n > 1.
    Stop tokens are the model's EOS ids unless `ignore_eos`, `stop_token_ids`, and stop
    strings that are written exactly as a special token.

    tokenizer: None serves ids only. task, pooling: as in `Request`. decoded: `wire` is what a body
    was decoded into, whose ranges were looked at then. Raises InvalidRequest (or
    ContextTooLong) naming the field.
    """
    sampling = wire.sampling_params
    if not decoded:
        check_ranges(sampling)
        check_ranges(wire, skip=("input_ids", "sampling_params"))
    check_count(sampling.n, state)
    _check_turn(wire)
    prompt_ids = _prompt_ids(wire, tokenizer, state, task, decoded=decoded)
    given = _given(wire, state)
    stop_ids, strings = _stops(sampling, tokenizer, state)
    base = default_seed if sampling.sampling_seed is None else sampling.sampling_seed
    group = wire.rid if wire.rid is not None else fresh_id()
    first = Request(
        rid=group if sampling.n == 1 else sample_id(group, 0),
        prompt_ids=prompt_ids,
        sampling=_sampling(sampling, strings),
        seed=derive_seed(base, 0),
        group=group,
        stop_ids=stop_ids,
        priority=wire.priority,
        salt=_salt(wire),
        top_logprobs=wire.top_logprobs_num if wire.return_logprob else 0,
        prompt_logprob_start=wire.logprob_start_len if wire.return_logprob else -1,
        stream=wire.stream or bool(strings),
        kv_policy=wire.kv_policy,
        entropy=wire.return_entropy,
        logprob_ids=list(wire.token_ids_logprob or []) if wire.return_logprob else [],
        output_ids=given[0] if given else None,
        hold_at=wire.hold_at,
        allowed_token_ids=_allowed(wire),
        grammar=_grammar(wire, tokenizer),
        logprob_law=wire.logprob_law,
        task=task,
        pooling=pooling,
        draft_tokens=wire.draft_tokens,
        forced_acceptance=wire.forced_acceptance,
        session=wire.session,
        session_at=wire.session_at,
        return_routed_experts=wire.return_routed_experts,
        routed_experts_start_len=wire.routed_experts_start_len,
    )
    _check(wire, first, state)
    check_top_entries(num_top_entries(first, sampling.n, state))
    others = [
        msgspec.structs.replace(first, rid=sample_id(group, i), seed=derive_seed(base, i))
        for i in range(1, sampling.n)
    ]
    if given:
        others = _continued(others, given[1:], state)
    return [first, *others]


def _check_turn(wire: GenerateRequest) -> None:
    """A session has one continuation; the other things that a turn may not ask for, the engine
    refuses, which knows the session."""
    if wire.session and wire.sampling_params.n > 1:
        raise InvalidRequest(
            f"n is {wire.sampling_params.n}; a turn of a session is one sample", field="n"
        )


def _allowed(wire: GenerateRequest) -> IntArray | None:
    ids = wire.allowed_token_ids
    return None if ids is None else np.array(ids, np.int32)


def _sampling(sampling: SamplingParams, strings: list[str]) -> SamplingParams:
    """The parameters of one sample, whose `grammar` is a field of its own."""
    grammars = (sampling.json_schema, sampling.regex, sampling.ebnf, sampling.structural_tag)
    stop = strings or None
    if sampling.n == 1 and sampling.stop == stop and grammars == _NO_GRAMMARS:
        return sampling
    return msgspec.structs.replace(
        sampling, n=1, stop=stop, json_schema=None, regex=None, ebnf=None, structural_tag=None
    )


def _grammar(wire: GenerateRequest, tokenizer: Tokenizer | None) -> Grammar | None:
    grammar = grammar_of(wire)
    if grammar is not None and tokenizer is None:
        raise InvalidRequest(
            "this model came without a tokenizer, so no text can be asked of it; leave grammar out",
            field="grammar",
        )
    return grammar


def num_sent(wire: GenerateRequest) -> int:
    """Output tokens that `wire` brings, of all its samples."""
    return sum(len(ids) if isinstance(ids, list) else 1 for ids in wire.output_ids or ())


def with_seed(wire: GenerateRequest, default_seed: int) -> GenerateRequest:
    """`wire` as it is to be kept for its reply: a request that will be held, and has no seed,
    states the one that `expand` would use, which whoever continues it has to send."""
    sampling = wire.sampling_params
    if wire.hold_at < 0 or sampling.sampling_seed is not None:
        return wire
    stated = msgspec.structs.replace(sampling, sampling_seed=default_seed)
    return msgspec.structs.replace(wire, sampling_params=stated)


def _continued(
    requests: list[Request], given: list[IntArray], state: ReplicaState
) -> list[Request]:
    """The samples after the first, each with its own output tokens."""
    found = []
    for number, (request, ids) in enumerate(zip(requests, given, strict=True), start=1):
        request = msgspec.structs.replace(request, output_ids=ids)
        try:
            check_continued(request, limits_of(state))
        except InvalidRequest as error:
            message = f"sample {number}: {error.message}"
            raise type(error)(message, field=error.field) from error
        found.append(request)
    return found


def check_count(count: int, state: ReplicaState) -> None:
    """Before anything is made `count` times, or room kept for as many. Raises InvalidRequest
    (`n`)."""
    if count < 1:
        raise InvalidRequest(f"n is {count}; it must be at least 1", field="n")
    if count > state.max_samples:
        raise InvalidRequest(
            f"n is {count}; the most is {state.max_samples} (max_samples); send several",
            field="n",
        )
    check_total(count, state, field="n")


def check_total(count: int, state: ReplicaState, *, field: str) -> None:
    """Refuse a call whose `count` sequences could not even wait together, as they all do before
    the first step, however long its caller tries. Raises InvalidRequest naming `field`."""
    if count > state.max_waiting:
        raise InvalidRequest(
            f"{field} asks for {count} sequences at once; this engine lets {state.max_waiting} "
            "wait, so send at most as many",
            field=field,
        )


def _check(wire: GenerateRequest, request: Request, state: ReplicaState) -> None:
    """The engine's own checks but for the ranges that `expand` has looked at, with the names that
    the wire gives the fields."""
    names = {
        "prompt_ids": "text" if wire.input_ids is None else "input_ids",
        "top_logprobs": "top_logprobs_num",
        "prompt_logprob_start": "logprob_start_len",
        "logprob_ids": "token_ids_logprob",
    }
    try:
        check_served(request, limits_of(state))
        check_route_dtype(request, wire.routed_experts_dtype, state.experts)
    except InvalidRequest as error:
        name = names.get(error.field, error.field)
        message = error.message.replace(error.field, name) if error.field else error.message
        raise type(error)(message, field=name) from error


def num_top_entries(request: Request, count: int, state: ReplicaState) -> int:
    """Entries of likeliest and named tokens that `count` samples of `request` may have."""
    num_output = min(
        request.sampling.max_new_tokens, state.context_length - len(request.prompt_ids)
    )
    start = request.prompt_logprob_start
    num_rows = num_output + (len(request.prompt_ids) - start if start >= 0 else 0)
    return request.num_alternatives * num_rows * count


def check_top_entries(entries: int) -> None:
    """Refuse likeliest tokens by the million, which are held until the call ends."""
    if entries > MAX_TOP_ENTRIES:
        raise InvalidRequest(
            "top_logprobs_num (and the tokens of token_ids_logprob) times the positions of all "
            f"samples is up to {entries}; at most {MAX_TOP_ENTRIES} entries fit into one call, so "
            "ask for fewer of either, or send several calls",
            field="top_logprobs_num",
        )


def _salt(wire: GenerateRequest) -> str:
    """One cache key of both; the lengths keep ("a", "bc") and ("ab", "c") apart."""
    if not wire.extra_key:
        return wire.cache_salt
    return f"{len(wire.cache_salt)}:{wire.cache_salt}{wire.extra_key}"


def check_text(
    text: str, tokenizer: Tokenizer, context_length: int, *, field: str = "text"
) -> None:
    """Refuse, before it is encoded, text that no tokens could fit into the context.

    Raises ContextTooLong naming `field`.
    """
    most = context_length * tokenizer.longest_token_bytes
    # A character has 1 to 4 bytes, which are counted only where it matters.
    if 4 * len(text) > most and (len(text) > most or len(text.encode()) > most):
        raise ContextTooLong(
            f"{field} has {len(text)} characters, more than {context_length} tokens of at most "
            f"{tokenizer.longest_token_bytes} bytes can hold; shorten it",
            field=field,
        )


def _prompt_ids(
    wire: GenerateRequest,
    tokenizer: Tokenizer | None,
    state: ReplicaState,
    task: Task,
    *,
    decoded: bool,
) -> IntArray:
    if (wire.text is None) == (wire.input_ids is None):
        found = "neither" if wire.text is None else "both"
        raise InvalidRequest(
            f"send exactly one of text and input_ids; {found} came", field="text, input_ids"
        )
    if wire.input_ids is not None:
        # Whoever generates needs room for a token more.
        most = state.context_length - (task == "generate")
        return _as_int32(wire.input_ids, "input_ids", state, most, decoded=decoded)
    if tokenizer is None:
        raise InvalidRequest(
            "this model came without a tokenizer; send input_ids instead of text", field="text"
        )
    assert wire.text is not None
    check_text(wire.text, tokenizer, state.context_length)
    ids = tokenizer.encode(wire.text)
    if not ids:
        raise InvalidRequest("text has no tokens; send a prompt", field="text")
    return np.array(ids, dtype=np.int32)


def _given(wire: GenerateRequest, state: ReplicaState) -> list[IntArray]:
    """The output tokens that each of the `n` samples begins with; empty if none does."""
    given, count = wire.output_ids, wire.sampling_params.n
    if not given:
        return []
    num_lists = sum(isinstance(ids, list) for ids in given)
    if num_lists not in (0, len(given)):
        raise InvalidRequest(
            "output_ids mixes ids and lists; send the ids of one sample, or a list a sample",
            field="output_ids",
        )
    lists: list[Any] = list(given) if num_lists else [given]
    if len(lists) != count:
        found = f"{num_lists} lists" if num_lists else "the ids of one sample"
        raise InvalidRequest(
            f"output_ids has {found} where n is {count}; send a list for each sample, in the "
            "order of their index, empty for one that has no tokens yet",
            field="output_ids",
        )
    return [_as_int32(ids, "output_ids", state, state.context_length - 1) for ids in lists]


def _as_int32(
    ids: list[int], field: str, state: ReplicaState, most: int, *, decoded: bool = False
) -> IntArray:
    if len(ids) > most:
        raise ContextTooLong(
            f"{field} has {len(ids)} tokens, too many for a context of {state.context_length}; "
            "shorten it",
            field=field,
        )
    if decoded:
        return np.array(ids, np.int32)
    try:
        found = np.array(ids)
    except ValueError as error:
        raise InvalidRequest(f"{field}: {error}", field=field) from error
    plain = found.ndim == 1 and found.dtype.kind == "i"
    if len(ids) and not (plain and -(1 << 31) <= found.min() <= found.max() < 1 << 31):
        raise InvalidRequest(f"{field} must be a list of token ids", field=field)
    return found.astype(np.int32)


def _stops(
    sampling: SamplingParams, tokenizer: Tokenizer | None, state: ReplicaState
) -> tuple[list[int], list[str]]:
    """Stop ids, and the stop strings that have to be looked for in the text."""
    ids = list(sampling.stop_token_ids or [])
    if not sampling.ignore_eos:
        known = state.eos_ids if tokenizer is None else [*state.eos_ids, *tokenizer.eos_ids]
        ids += [token for token in known if token < state.vocab_size]
    strings: list[str] = []
    for stop in stop_strings(sampling):
        if not stop:
            raise InvalidRequest("a stop string is empty", field="stop")
        if tokenizer is None:
            raise InvalidRequest(
                "stop strings need a tokenizer, which this model has not; use stop_token_ids",
                field="stop",
            )
        token_id = tokenizer.special_token_id(stop)
        if token_id is None:
            strings.append(stop)
        else:
            ids.append(token_id)
    return list(dict.fromkeys(ids)), strings
