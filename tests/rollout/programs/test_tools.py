"""Functions that a model calls: their schemas, their arguments, and the loop of calls."""

import asyncio
import json
from typing import Any, Literal

import pytest

from engine.errors import InvalidRequest
from rollout.program import Answer, Runner, State, Tool, ToolFailed, ToolRefused, answer, tool
from tests.helpers.program_engines import ScriptedBackend


@tool
def weather(city: str, unit: Literal["C", "F"] = "C", days: int = 1) -> dict[str, str]:
    """The weather of a city."""
    if city == "Nowhere":
        raise ToolRefused("there is no such city")
    return {"city": city, "unit": unit, "days": str(days)}


@tool
async def half(number: float) -> float:
    """Half of a number."""
    await asyncio.sleep(0)
    return number / 2


@tool
def broken() -> str:
    """Raises."""
    raise ZeroDivisionError("by zero")


def call_of(name: str, **arguments: object) -> str:
    told = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{told}\n</tool_call>"


async def ask(s: State, tools: list[Tool], **options: object) -> Answer:
    s.use_tools(tools)
    s.system("help")
    s.user("q")
    return await answer(s, "reply", tools, **options)


def test_the_schema_of_a_function() -> None:
    assert weather.told["function"] == {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"enum": ["C", "F"], "default": "C"},
                "days": {"type": "integer", "default": 1},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    }


@pytest.mark.parametrize(
    "arguments,result",
    [
        ('{"city": "Rome"}', {"city": "Rome", "unit": "C", "days": "1"}),
        ('{"city": "Nowhere"}', "error: there is no such city"),
        ('{"city": 3}', "error: Expected `str`, got `int` - at `$.city`"),
        ('{"city": "Rome", "hour": 3}', "error: Object contains unknown field `hour`"),
        ("{", "error: Input data was truncated"),
    ],
)
def test_a_call_answers_whatever_its_arguments(arguments: str, result: object) -> None:
    found = asyncio.run(weather.call(arguments))
    assert found == (result if isinstance(result, str) else json.dumps(result))


def test_parameters_without_a_type_are_refused() -> None:
    def untyped(a, b: int) -> int:  # type: ignore[no-untyped-def]
        return b

    def many(*names: str) -> None: ...

    for function, field in ((untyped, "untyped.a"), (many, "many.names")):
        with pytest.raises(InvalidRequest) as caught:
            tool(function)
        assert caught.value.field == field
    with pytest.raises(InvalidRequest, match="without a schema"):
        tool(_of_object)


def _of_object(a: Tool, b: complex) -> None: ...


def test_calls_are_answered_until_there_are_none() -> None:
    calls = f"Let me see. {call_of('half', number=3)}\n{call_of('weather', city='Rome')}"
    backend = ScriptedBackend(calls, call_of("half", number=1.5), "It is 0.75.")
    found = Runner(backend).run(ask, [weather, half], temperature=0.5)
    assert found.text == "It is 0.75."
    assert [(call.name, call.result) for call in found.calls] == [
        ("half", "1.5"),
        ("weather", '{"city": "Rome", "unit": "C", "days": "1"}'),
        ("half", "0.75"),
    ]
    assert [reply.name for reply in found.replies] == ["reply", "reply.1", "reply.2"]
    assert {wire.sampling_params.temperature for wire in backend.requests} == {0.5}
    prompts = [
        backend.tokenizer.decode(w.input_ids or [], skip_special_tokens=False)
        for w in backend.requests
    ]
    assert '"name": "weather"' in prompts[0] and prompts[0].startswith("<|im_start|>system\nhelp\n")
    assert prompts[1].startswith(prompts[0] + calls + "<|im_end|>\n<|im_start|>tool\n1.5<|im_end|>")
    assert prompts[2].startswith(prompts[1])


def test_a_first_call_is_held_to_the_form_of_the_family() -> None:
    backend = ScriptedBackend(call_of("half", number=2), "1")
    found = Runner(backend).run(ask, [half], call_first="half")
    assert found.text == "1"
    first, second = (wire.grammar for wire in backend.requests)
    assert first is not None and first.kind == "lark" and second is None
    with pytest.raises(InvalidRequest) as caught:
        Runner(ScriptedBackend()).run(ask, [half], call_first="third")
    assert caught.value.field == "reply.call_first"


def test_a_function_that_raises_and_a_model_that_never_answers() -> None:
    with pytest.raises(ToolFailed, match=r"broken\(\{\}\) raised ZeroDivisionError") as caught:
        Runner(ScriptedBackend(call_of("broken"))).run(ask, [broken])
    assert caught.value.field == "broken"
    with pytest.raises(ToolFailed, match="still called half in round 2"):
        Runner(ScriptedBackend(*[call_of("half", number=1)] * 2)).run(ask, [half], max_rounds=2)


def test_tools_are_told_at_the_beginning() -> None:
    async def late(s: State) -> None:
        s.user("q")
        await s.gen("a")
        s.use_tools([half])

    async def untold(s: State) -> None:
        s.user("q")
        await answer(s, "a", [half])

    with pytest.raises(InvalidRequest, match="at the beginning"):
        Runner(ScriptedBackend("a")).run(late)
    with pytest.raises(InvalidRequest, match="use_tools with them first"):
        Runner(ScriptedBackend()).run(untold)


@tool
def odd() -> object:
    """Returns what JSON has no word for."""
    return object()


@tool
def deep(tree: list[Any]) -> str:
    """Takes anything."""
    return "seen"


def test_a_result_that_cannot_be_told_and_rounds_that_are_none() -> None:
    with pytest.raises(ToolFailed, match="odd") as caught:
        Runner(ScriptedBackend(call_of("odd"))).run(ask, [odd])
    assert caught.value.field == "odd"
    for rounds in (0, -1):
        with pytest.raises(InvalidRequest, match="give at least 1") as refused:
            Runner(ScriptedBackend()).run(ask, [half], max_rounds=rounds)
        assert refused.value.field == "max_rounds"


@pytest.mark.parametrize("arguments", ['{"tree": ' + "[" * 5000, '{"tree": ["\\ud800"]}', "\ud800"])
def test_arguments_that_no_decoder_takes_are_told_to_the_model(arguments: str) -> None:
    assert asyncio.run(deep.call(arguments)).startswith("error: ")


def test_a_call_of_a_function_that_there_is_not() -> None:
    backend = ScriptedBackend(call_of("third"), "done")
    found = Runner(backend).run(ask, [half])
    assert found.text in ("done", call_of("third"))
