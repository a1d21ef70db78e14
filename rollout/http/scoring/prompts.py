"""Prompts of requests that sample nothing, from bodies to ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.errors import InvalidRequest
from rollout.http.scoring.bodies import Body
from rollout.http.services import Services
from rollout.requests.expand import check_text, check_total
from rollout.text.tokenizer import Tokenizer

Prompt = str | list[int] | tuple[str, str]
"""A text, ids, or two texts that are read as one."""

_INLINE_CHARS = 8192
_MOST_TOKENS = 1 << 23
"""Of all prompts of a call: a query may stand before thousands of texts."""


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """How the prompts of one body become ids. most: tokens that stay; None cuts nothing."""

    tokenizer: Tokenizer | None
    field: str
    context_length: int
    add_special_tokens: bool
    most: int | None
    keeps: Literal["first", "last"]

    def all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Ids of each. Raises InvalidRequest naming the prompt by its place."""
        found: list[list[int]] = []
        size = 0
        for number, prompt in enumerate(prompts):
            try:
                found.append(self._ids(prompt))
                size += len(found[-1])
                if size > _MOST_TOKENS:
                    raise InvalidRequest(
                        f"with it the prompts have more than {_MOST_TOKENS} tokens together; send "
                        "several calls",
                        field=self.field,
                    )
            except InvalidRequest as error:
                place = places(self.field, len(prompts))[number]
                raise type(error)(f"{place}: {error.message}", field=place) from error
        return found

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, list):
            ids = prompt
            if self.most is not None:
                ids = ids[: self.most] if self.keeps == "first" else ids[-self.most :]
        else:
            ids = self._encoded((prompt,) if isinstance(prompt, str) else prompt)
        if not ids:
            raise InvalidRequest("there are no tokens; send a prompt", field=self.field)
        return ids

    def _encoded(self, texts: tuple[str] | tuple[str, str]) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequest(
                "this model came without a tokenizer; send ids where the route takes them",
                field=self.field,
            )
        # What is cut may be of any length, but for what stands before it.
        for text in texts[:-1] if self.most is not None else texts:
            check_text(text, self.tokenizer, self.context_length, field=self.field)
        return self.tokenizer.encode_pair(
            *texts,
            add_special_tokens=self.add_special_tokens,
            max_tokens=self.most,
            keeps=self.keeps,
        )


def places(field: str, count: int) -> list[str]:
    """What each of `count` prompts of a field is called: by its place, where there are several."""
    return [field] if count == 1 else [f"{field}[{number}]" for number in range(count)]


async def encoded(
    services: Services, prompts: Sequence[Prompt], body: Body, *, field: str
) -> list[list[int]]:
    """Ids of the prompts of a body, cut as it says; of much text beside the event loop.

    Raises InvalidRequest or ContextTooLong naming `field`, and the prompt where there are several,
    or an option.
    """
    facts = services.engine.facts
    check_total(len(prompts), facts, field=field)
    encoder = _Encoder(
        tokenizer=services.tokenizer,
        field=field,
        context_length=facts.context_length,
        add_special_tokens=body.add_special_tokens,
        most=_most(body.truncate_prompt_tokens, facts.context_length),
        keeps="first" if body.truncation_side == "right" else "last",
    )
    if sum(map(_num_chars, prompts)) <= _INLINE_CHARS:
        return encoder.all(prompts)
    return await services.generator.workers.run(encoder.all, prompts)


def _most(asked: int | None, context_length: int) -> int | None:
    if asked is None:
        return None
    if asked < -1 or asked == 0:
        raise InvalidRequest(
            f"truncate_prompt_tokens is {asked}; give at least 1, or -1 for the whole context",
            field="truncate_prompt_tokens",
        )
    return context_length if asked == -1 else min(asked, context_length)


def _num_chars(prompt: Prompt) -> int:
    return sum(map(len, prompt)) if isinstance(prompt, tuple) else len(prompt)
