"""A reply for which the model may call functions: calls, results, and again until it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from engine.protocol import Grammar
from rollout.http.chat.reader import ReplyReader
from rollout.parsers.events import Reply
from rollout.parsers.formats import ReplyFormat
from rollout.programs.concurrently import together
from rollout.programs.errors import ToolFailed, naming
from rollout.programs.generated import Generated
from rollout.programs.state import State
from rollout.programs.tools import Tool

_ANY = "any"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolResult:
    """One call: the function, its arguments as the model wrote them (JSON text), and its result."""

    name: str
    arguments: str
    result: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model said in the end. text, reasoning: of the last reply, without calls and thinking
    marks. calls: all of them, in order. replies: of every round, as sampled."""

    text: str
    reasoning: str
    calls: tuple[ToolResult, ...]
    replies: tuple[Generated, ...]


async def answer(
    state: State,
    name: str,
    tools: Sequence[Tool],
    *,
    call_first: str = "",
    max_rounds: int = 8,
    **sampling: Any,
) -> Answer:
    """Have the model answer, and call `tools` before as often as it likes.

    The tools were told by `state.use_tools(tools)` at the beginning. Replies are the variables
    `name`, `name.1`, ... of the state. Calls are read as the model's family writes
    them (docs/tool_calls.md); those of one reply run beside each other. call_first: a function
    that has to be called in the first reply, or "any"; its arguments are then held to its schema.
    max_rounds: most replies. sampling: as in `State.gen`.

    Raises ToolFailed for a function that raised, and for a model that still calls in the last
    round; InvalidRequest (`tools`) for tools that the state was not told of, (`max_rounds`).
    """
    if max_rounds < 1:
        raise InvalidRequest(f"max_rounds is {max_rounds}; give at least 1", field="max_rounds")
    by_name = _told(state, tools)
    replies: list[Generated] = []
    results: list[ToolResult] = []
    for number in range(max_rounds):
        variable = name if not number else f"{name}.{number}"
        forced = call_first if not number else ""
        generated, reply = await _reply(state, variable, forced, sampling)
        replies.append(generated)
        if not reply.calls:
            return Answer(
                text=reply.content,
                reasoning=reply.reasoning,
                calls=tuple(results),
                replies=tuple(replies),
            )
        found = await together([by_name[call.name].call(call.arguments) for call in reply.calls])
        for call, result in zip(reply.calls, found, strict=True):
            results.append(ToolResult(name=call.name, arguments=call.arguments, result=result))
            state.turn("tool", result, tool_call_id=call.id, name=call.name)
    raise ToolFailed(
        f"{name}: the model still called {results[-1].name} in round {max_rounds}; allow more "
        "max_rounds, or have it answer",
        field=name,
    )


async def _reply(
    state: State, name: str, forced: str, sampling: dict[str, Any]
) -> tuple[Generated, Reply]:
    """One reply and what it holds."""
    with state.reply():
        turns = state.turns
        written = turns.reply_format()
        reader = ReplyReader(
            written.parser(turns.tools, turns.thinks_at_once()),
            hidden=state.tokenizer.special_texts if written.keeps_special_tokens else (),
        )
        with naming(name):
            grammar = _forced_call(written, turns.tools, forced)
        generated = await state.gen(
            name,
            grammar=grammar,
            skip_special_tokens=not written.keeps_special_tokens,
            **sampling,
        )
    reader.whole(generated.text)
    return generated, reader.reply()


def _forced_call(
    written: ReplyFormat, tools: Sequence[Mapping[str, Any]], forced: str
) -> Grammar | None:
    """What a reply has to be that has to call. Raises InvalidRequest (`call_first`)."""
    if not forced:
        return None
    names = [tool["function"]["name"] for tool in tools]
    if forced != _ANY and forced not in names:
        raise InvalidRequest(
            f"call_first is {forced!r}; give one of {', '.join(names)}, or {_ANY!r}",
            field="call_first",
        )
    return written.force(tools, None if forced == _ANY else forced, False)


def _told(state: State, tools: Sequence[Tool]) -> dict[str, Tool]:
    by_name = {tool.name: tool for tool in tools}
    known = [tool["function"]["name"] for tool in state.turns.tools]
    if sorted(known) != sorted(by_name):
        raise InvalidRequest(
            f"the state was told of the tools {', '.join(known) or '(none)'}, and "
            f"{', '.join(by_name) or '(none)'} are given; call state.use_tools with them first",
            field="tools",
        )
    return by_name
