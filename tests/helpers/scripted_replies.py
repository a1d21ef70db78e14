"""An engine whose replies are the texts that a test gives it, and templates that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.config import EngineConfig
from engine.protocol import StepPlan
from tests.helpers.fake_executor import EOS_ID, FakeExecutor
from tests.helpers.replicas import fake_config
from tests.helpers.tiny_tokenizer import tiny_tokenizer

ENGINE = fake_config(num_pages=2000)

TEMPLATE = """\
{%- for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}
{%- for message in messages %}[{{ message.role }}]
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set said = {'name': call.function.name, 'arguments': call.function.arguments} %}
{{- '<tool_call>' }}{{ said | tojson }}{{ '</tool_call>' }}
{%- endfor %}
{%- endfor %}[assistant]"""
"""Calls as Hermes writes them."""

THINKING = (
    TEMPLATE + "{% if enable_thinking is defined %}{% if enable_thinking %}<think>{% else %}"
    "<think></think>{% endif %}{% endif %}"
)
"""The same, of a family that thinks, with a switch."""

CALL = '<tool_call>{"name": "forecast", "arguments": {"city": "Oslo", "days": 2}}</tool_call>'
OTHER_CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "The weather to come",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


class ScriptedExecutor(FakeExecutor):
    """Request number i gets text i of `texts`, round and round, and ends."""

    def __init__(self, config: EngineConfig, texts: Sequence[str]) -> None:
        super().__init__(config)
        tokenizer = tiny_tokenizer()
        self._texts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self._scripts: dict[int, list[int]] = {}
        self._count = 0

    def _enter(self, plan: StepPlan) -> None:
        super()._enter(plan)
        for row in plan.new_rows:
            self._scripts[row.slot] = self._texts[self._count % len(self._texts)]
            self._count += 1

    def _next(self, slot: int, allowed: Sequence[int]) -> int:
        script, place = self._scripts[slot], len(self._rows[slot]) - self._prompts[slot][1]
        return script[place] if place < len(script) else EOS_ID


def replying(*texts: str) -> Callable[[EngineConfig], ScriptedExecutor]:
    """What makes such an engine, for `serving(executor=...)`."""
    return lambda config: ScriptedExecutor(config, texts)


def scripted(*texts: str, template: str = TEMPLATE, **options: Any) -> dict[str, Any]:
    """Options of `serving` for a server that replies by `texts`."""
    return {
        "engine": ENGINE,
        "tokenizer": tiny_tokenizer(template=template),
        "executor": replying(*texts),
        **options,
    }
