"""What the steps of a program return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.errors import by_name
from engine.protocol import GenerateRequest, GenerateResponse


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One reply, or part of one, as it was sampled.

    name: of the variable. text: without the stop token or string that ended it. token_ids, with
    the stop token if one ended it; logprobs: one for each token. seed: of the request, its
    `sampling_seed`. finish: "stop" or "length"; matched: the stop token or string. prompt_tokens:
    of what it went on from, and cached_tokens those of them whose KV was in the cache.
    weight_versions: as in replies, `{"version", "start", "end"}`. with_special: the text shows
    special tokens. value: what `returns` made of the text; else None.
    """

    name: str
    text: str
    token_ids: list[int]
    logprobs: list[float]
    seed: int
    finish: str
    matched: int | str | None
    prompt_tokens: int
    cached_tokens: int
    weight_versions: list[dict[str, Any]]
    with_special: bool
    value: Any = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected:
    """The likeliest of some texts.

    index: its place among the choices. logprobs: of every choice, the sum over its tokens given
    what came before. num_tokens: of every choice. token_ids: of the one selected. prompt_tokens,
    cached_tokens: summed over the requests that scored the choices.
    """

    name: str
    text: str
    index: int
    logprobs: list[float]
    num_tokens: list[int]
    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int

    def __str__(self) -> str:
        return self.text


Variable = Generated | Selected


def read_reply(name: str, wire: GenerateRequest, reply: GenerateResponse) -> Generated:
    """The reply to `wire`, which asked for logprobs and stated a seed. Raises the error that ended
    it, if one did."""
    meta = reply.meta_info
    finish = finish_of(meta)
    return Generated(
        name=name,
        text=reply.text or "",
        token_ids=reply.output_ids,
        logprobs=[entry[0] for entry in meta["output_token_logprobs"]],
        seed=wire.sampling_params.sampling_seed or 0,
        finish=finish["type"],
        matched=finish.get("matched"),
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        weight_versions=meta["weight_versions"],
        with_special=not wire.sampling_params.skip_special_tokens,
    )


def finish_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Why a reply ended. Raises its error if the engine ended it."""
    finish: dict[str, Any] = meta["finish_reason"]
    if finish["type"] == "abort":
        raise by_name(finish.get("error") or "EngineDead", str(finish.get("message")))
    return finish
