"""From a finished sequence to the native `/generate` reply (keys of SGLang's meta_info)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.protocol import (
    FinishReason,
    FloatArray,
    GenerateRequest,
    GenerateResponse,
    IntArray,
    Request,
    RequestOutput,
    TopLogprobs,
    VersionSpan,
)
from rollout.requests.outputs import finite_logprobs
from rollout.requests.sample_ids import shown
from rollout.requests.version_spans import clip_spans, join_spans
from rollout.scheduler.continued import given_stop, shown_given
from rollout.scheduler.routes.reply_fields import route_meta
from rollout.scheduler.speculative.reply_fields import spec_meta
from rollout.text.detokenizer import Detokenizer, final_text
from rollout.text.token_bytes import spelled
from rollout.text.tokenizer import Tokenizer

LogprobEntry = list[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """Where the reply to a continued request goes on from those before.

    num_tokens: output tokens that came with the request, up to the stop that ended them if one
    did. num_chars: characters of the output's text that were certain with them, which a reply
    held there ends with; None without a tokenizer.
    """

    num_tokens: int
    num_chars: int | None


def seam(request: Request, tokenizer: Tokenizer | None) -> Seam | None:
    """The seam of a request; None if it came with no output tokens."""
    if request.output_ids is None:
        return None
    num_tokens, num_chars = given_stop(request) + 1 or len(request.output_ids), None
    if tokenizer is not None:
        detokenizer = Detokenizer(tokenizer, request.sampling, request.prompt_ids)
        certain = detokenizer.feed(shown_given(request))
        num_chars = len(certain.text)
        if certain.stop is not None:
            num_tokens = certain.stop.num_tokens
    return Seam(num_tokens=num_tokens, num_chars=num_chars)


def respond(
    wire: GenerateRequest,
    request: Request,
    output: RequestOutput,
    tokenizer: Tokenizer | None,
    *,
    index: int | None = None,
    begin: Seam | None = None,
    text: str | None = None,
) -> GenerateResponse:
    """The reply to one of the sequences of `wire`; its text is None without a tokenizer.

    index: which of the `n` samples it is; None when one was asked for. begin, text: the `seam` of
    a continued request and the text of the reply, if the caller has them.
    """
    begin = begin or seam(request, tokenizer)
    if tokenizer is None:
        text = None
    elif text is None:
        text = text_of(request, output, tokenizer, begin)
    return GenerateResponse(
        text=text,
        output_ids=output.token_ids.tolist(),
        meta_info=_meta_info(wire, request, output, tokenizer, begin),
        prompt_token_ids=request.prompt_ids.tolist() if wire.return_prompt_token_ids else None,
        index=index,
    )


def text_of(
    request: Request, output: RequestOutput, tokenizer: Tokenizer, begin: Seam | None
) -> str:
    """The text of a finished sequence from its seam on."""
    ids, sampling = output.token_ids.tolist(), request.sampling
    if begin is None:
        return final_text(tokenizer, ids, output.finish, sampling, request.prompt_ids)
    assert request.output_ids is not None and begin.num_chars is not None
    ids = [*request.output_ids[: begin.num_tokens].tolist(), *ids]
    whole = final_text(tokenizer, ids, output.finish, sampling, request.prompt_ids)
    return whole[begin.num_chars :]


def to_wire(response: GenerateResponse) -> dict[str, Any]:
    """The reply as an object to encode: `output_ids` also when empty, no absent fields. What the
    reply holds is not copied."""
    found: dict[str, Any] = {"output_ids": response.output_ids}
    if response.text is not None:
        found["text"] = response.text
    if response.meta_info:
        found["meta_info"] = response.meta_info
    if response.prompt_token_ids is not None:
        found["prompt_token_ids"] = response.prompt_token_ids
    if response.index is not None:
        found["index"] = response.index
    return found


class RunningReply:
    """The reply to a sequence that still runs: everything so far, each token looked at once.

    Arguments as in `respond`; the tokenizer is for the tokens of logprobs alone: the caller has
    the text.
    """

    def __init__(
        self,
        wire: GenerateRequest,
        request: Request,
        tokenizer: Tokenizer | None,
        index: int | None,
        begin: Seam | None,
    ) -> None:
        self._begin = begin
        self._texts = tokenizer if wire.return_text_in_logprobs else None
        self._wire = wire
        self._request = request
        self._index = index
        self._ids: list[int] = []
        self._lists: dict[str, list[Any]] = {}
        self._spans: list[VersionSpan] = []
        self._first: RequestOutput | None = None
        self._input: dict[str, Any] = {}

    def add(self, output: RequestOutput) -> None:
        """Take the next output."""
        wire = self._wire
        if self._first is None:
            self._first = output
            if wire.return_logprob and wire.logprob_start_len >= 0:
                self._input = _input_logprobs(wire, self._request, output, self._texts)
        self._ids += output.token_ids.tolist()
        self._spans = join_spans([*self._spans, *output.spans])
        if wire.return_logprob:
            for name, values in _output_logprobs(wire, output, self._texts).items():
                if isinstance(values, list):
                    self._lists.setdefault(name, []).extend(values)
        if output.entropies is not None:
            self._lists.setdefault("output_token_entropy", []).extend(output.entropies.tolist())
        self._last = output

    def response(self, text: str | None) -> GenerateResponse:
        """The reply with everything so far; its lists grow with the next `add`."""
        wire, request = self._wire, self._request
        assert self._first is not None, "a partial reply needs an output"
        lists = dict(self._lists)
        entropies = lists.pop("output_token_entropy", None)
        size = self._first.start + len(self._ids)
        meta = _counts(request, self._first, self._last, self._spans, size, self._begin)
        if (entries := lists.pop("output_token_logprobs", None)) is not None:
            meta["output_token_logprobs"] = entries
            meta["output_token_logprobs_length"] = len(entries)
        meta |= lists
        meta |= self._input
        if entropies is not None:
            meta["output_token_entropy"] = entropies
        return GenerateResponse(
            text=text,
            output_ids=self._ids,
            meta_info=meta,
            prompt_token_ids=request.prompt_ids.tolist() if wire.return_prompt_token_ids else None,
            index=self._index,
        )


def token_entries(
    wire: GenerateRequest, output: RequestOutput, tokenizer: Tokenizer | None
) -> list[LogprobEntry]:
    """`output_token_logprobs` of the tokens of one output."""
    texts = tokenizer if wire.return_text_in_logprobs else None
    return _entries(output.logprobs, output.token_ids, texts)


def _meta_info(
    wire: GenerateRequest,
    request: Request,
    output: RequestOutput,
    tokenizer: Tokenizer | None,
    begin: Seam | None,
) -> dict[str, Any]:
    assert output.finish is not None, f"request {output.rid} has not finished"
    size = output.start + len(output.token_ids)
    meta = _counts(request, output, output, output.spans, size, begin)
    meta["finish_reason"] = _finish_reason(output.finish, size)
    if output.finish.type == "hold":
        meta["sampling_seed"] = wire.sampling_params.sampling_seed
    if wire.return_logprob:
        texts = tokenizer if wire.return_text_in_logprobs else None
        meta |= _output_logprobs(wire, output, texts)
        # Of a stream in increments, the first brings the prompt's.
        first = 0 if begin is None else begin.num_tokens
        if wire.logprob_start_len >= 0 and output.start == first:
            meta |= _input_logprobs(wire, request, output, texts)
    if output.entropies is not None:
        meta["output_token_entropy"] = output.entropies.tolist()
    return meta | route_meta(output, wire.routed_experts_dtype)


def _counts(
    request: Request,
    first: RequestOutput,
    last: RequestOutput,
    spans: list[VersionSpan],
    size: int,
    begin: Seam | None,
) -> dict[str, Any]:
    """What every reply says of the `size` output tokens there are, those that came with the request
    included; first, last: the outputs it is made of."""
    # That of a turn has the tokens of its session before its own.
    num_prompt = last.prompt_tokens if request.session else len(request.prompt_ids)
    counts: dict[str, Any] = {
        "id": shown(last.rid),
        "finish_reason": None,
        "prompt_tokens": num_prompt,
        "completion_tokens": size,
        "cached_tokens": first.cached_tokens,
        "num_retractions": last.num_retractions,
        "num_restarts": last.num_restarts,
        "weight_version": str(spans[-1].version) if spans else None,
        "weight_versions": _versions(spans, size),
        # Positions of prompt and output together: which weights computed the KV.
        "kv_versions": _versions(last.kv_spans, num_prompt + size),
        **spec_meta(last.spec, request),
    }
    if request.masked:
        counts["logprob_law"] = request.logprob_law
    if request.session:
        counts["session"] = {"id": request.session, "start": num_prompt - len(request.prompt_ids)}
    if begin is not None:
        counts |= {"output_start": begin.num_tokens, "text_start": begin.num_chars}
    return counts


def _versions(spans: list[VersionSpan], size: int) -> list[dict[str, Any]]:
    """Spans of the first `size` tokens; a stop string may have cut off what came after."""
    return [
        {"version": str(span.version), "start": span.start, "end": span.end}
        for span in clip_spans(spans, size)
    ]


def _finish_reason(finish: FinishReason, length: int) -> dict[str, Any]:
    if finish.type == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.type in ("length", "hold"):
        return {"type": finish.type, "length": length if finish.length is None else finish.length}
    reason: dict[str, Any] = {"type": "abort", "message": finish.message}
    return reason if finish.error is None else {**reason, "error": finish.error}


def _output_logprobs(
    wire: GenerateRequest, output: RequestOutput, texts: Tokenizer | None
) -> dict[str, Any]:
    entries = _entries(output.logprobs, output.token_ids, texts)
    found: dict[str, Any] = {
        "output_token_logprobs": entries,
        "output_token_logprobs_length": len(entries),
    }
    for name, columns in _alternatives(wire):
        found[f"output_{name}"] = _top_entries(output.top, texts, columns)
    return found


def _input_logprobs(
    wire: GenerateRequest, request: Request, output: RequestOutput, texts: Tokenizer | None
) -> dict[str, Any]:
    """Entries for prompt positions from the start asked for; position 0 has no logprob."""
    start = request.prompt_logprob_start
    first_scored = max(start, 1)
    ids = request.prompt_ids
    unscored: list[Any] = [[None, int(ids[0]), _text(int(ids[0]), texts)]] if start == 0 else []
    scored = []
    if output.prompt_logprobs is not None:
        # An abort may come before the whole prompt was scored.
        end = first_scored + len(output.prompt_logprobs)
        scored = _entries(output.prompt_logprobs, ids[first_scored:end], texts)
    found: dict[str, Any] = {"input_token_logprobs": unscored + scored}
    nothing = [None] * len(unscored)
    for name, columns in _alternatives(wire):
        found[f"input_{name}"] = nothing + _top_entries(output.prompt_top, texts, columns)
    return found


def _alternatives(wire: GenerateRequest) -> list[tuple[str, slice]]:
    """What is returned of other tokens: the key's end, and its columns of `TopLogprobs`."""
    count = wire.top_logprobs_num
    found: list[tuple[str, slice]] = []
    if count > 0:
        found.append(("top_logprobs", slice(0, count)))
    if wire.token_ids_logprob:
        found.append(("token_ids_logprobs", slice(count, count + len(wire.token_ids_logprob))))
    return found


def _entries(logprobs: FloatArray, ids: IntArray, texts: Tokenizer | None) -> list[LogprobEntry]:
    return _pairs(finite_logprobs(logprobs), ids.tolist(), texts)


def _top_entries(
    top: TopLogprobs | None, texts: Tokenizer | None, columns: slice
) -> list[list[LogprobEntry]]:
    if top is None:
        return []
    rows = zip(finite_logprobs(top.logprobs[:, columns]), top.ids[:, columns], strict=True)
    return [_pairs(logprobs, ids.tolist(), texts) for logprobs, ids in rows]


def _pairs(logprobs: list[float], ids: list[int], texts: Tokenizer | None) -> list[LogprobEntry]:
    pairs = zip(logprobs, ids, strict=True)
    if texts is None:
        return [[logprob, token_id, None] for logprob, token_id in pairs]
    return [[logprob, token_id, _text(token_id, texts)] for logprob, token_id in pairs]


def _text(token_id: int, texts: Tokenizer | None) -> str | None:
    return None if texts is None else spelled(texts.token_bytes(token_id))
