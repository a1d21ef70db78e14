"""The grammar that a native request asks for."""

from __future__ import annotations

from typing import TypeVar

from engine.errors import InvalidRequest, SlipstreamError
from engine.protocol import GenerateRequest, Grammar, GrammarKind

Error = TypeVar("Error", bound=SlipstreamError)

ANY_OBJECT = "$$ANY$$"
"""The `json_schema` by which SGLang's clients ask for any object."""

_KINDS: tuple[GrammarKind, ...] = ("json_schema", "regex", "ebnf", "structural_tag")


def grammar_of(wire: GenerateRequest) -> Grammar | None:
    """What constrains the outputs of `wire`: its `grammar`, or that of its sampling parameters.

    Raises InvalidRequest where more than one is set.
    """
    named: dict[str, Grammar] = {} if wire.grammar is None else {"grammar": wire.grammar}
    for kind in _KINDS:
        source: str | None = getattr(wire.sampling_params, kind)
        if source:
            named[f"sampling_params.{kind}"] = from_source(kind, source)
    if len(named) > 1:
        names = " and ".join(named)
        raise InvalidRequest(
            f"{names} constrain the same output; send one of them", field=list(named)[-1]
        )
    return next(iter(named.values()), None)


def from_source(kind: GrammarKind, source: str) -> Grammar:
    """The grammar of a source as clients of SGLang write it."""
    if kind == "json_schema" and source == ANY_OBJECT:
        return Grammar(kind="json_object", source="")
    return Grammar(kind=kind, source=source)


def grammar_field(wire: GenerateRequest) -> str:
    """By which field a native request has its grammar."""
    for kind in _KINDS:
        if getattr(wire.sampling_params, kind):
            return f"sampling_params.{kind}"
    return "grammar"


def in_field(error: Error, field: str) -> Error:
    """An error of a grammar as one of the field that it came by; others as they are."""
    if error.field != "grammar":
        return error
    message = error.message
    if message.startswith("grammar"):
        message = field + message.removeprefix("grammar")
    return type(error)(message, field=field)
