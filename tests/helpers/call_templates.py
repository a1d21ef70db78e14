"""For each family that writes calls, a chat template of its kind that writes replies alone: what
an assistant says and calls, without headers and ends of turns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rollout.text.chat_template import ChatTemplate

_HEAD = """\
{%- for message in messages if message.role == 'assistant' %}
{{- message.content or '' }}
"""
_TAIL = "\n{%- endfor %}"


def _reply(calls: str) -> str:
    """A template that writes replies: content, and what `calls` writes of calls."""
    return _HEAD + calls + _TAIL


HERMES = _reply("""\
{%- for call in message.tool_calls %}{%- set call = call.function %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}""")

QWEN_CODER = _reply("""\
{%- for call in message.tool_calls %}{%- set call = call.function %}
{{- '\\n<tool_call>\\n<function=' + call.name + '>\\n' }}
{%- for key, value in call.arguments | items %}
{{- '<parameter=' + key + '>\\n' }}
{%- if value is mapping or (value is sequence and value is not string) %}
{{- value | tojson }}{%- else %}{{- value | string }}{%- endif %}
{{- '\\n</parameter>\\n' }}
{%- endfor %}
{{- '</function>\\n</tool_call>' }}
{%- endfor %}""")

LLAMA3 = _reply("""\
{%- for call in message.tool_calls %}{%- set call = call.function %}
{{- '; ' if not loop.first else ('\\n' if message.content else '') }}
{{- '{"name": "' + call.name + '", ' + '"parameters": ' }}
{{- call.arguments | tojson }}{{- '}' }}
{%- endfor %}""")

LLAMA3_TAG = LLAMA3.replace("('\\n' if message.content else '')", "'<|python_tag|>'")

MISTRAL = _reply("""\
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- set out = call.function | tojson %}
{{- out[:-1] + ', "id": "' + call.id + '"}' }}
{{- ', ' if not loop.last else ']' }}
{%- endfor %}""")

MISTRAL_ARGS = _reply("""\
{%- for call in message.tool_calls %}{%- set call = call.function %}
{{- '[TOOL_CALLS]' + call.name + '[ARGS]' + call.arguments | tojson }}
{%- endfor %}""")

MISTRAL_CALL_ID = _reply("""\
{%- for call in message.tool_calls %}
{{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id }}
{{- '[ARGS]' + call.function.arguments | tojson }}
{%- endfor %}""")

DEEPSEEK_V3 = _reply("""\
{{- '<｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}{%- set call = call.function %}
{{- '\\n' if not loop.first }}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.name + '\\n```json\\n' }}
{{- call.arguments | tojson }}{{- '\\n```<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜>' }}""")

DEEPSEEK_V31 = _reply("""\
{{- '<｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}{%- set call = call.function %}
{{- '<｜tool▁call▁begin｜>' + call.name + '<｜tool▁sep｜>' }}
{{- call.arguments | tojson }}{{- '<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜>' }}""")

GLM = _reply("""\
{%- for call in message.tool_calls %}{%- set call = call.function %}
{{- '\\n<tool_call>' + call.name + '\\n' }}
{%- for key, value in call.arguments | items %}
{{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
{{- value if value is string else value | tojson }}{{- '</arg_value>\\n' }}
{%- endfor %}
{{- '</tool_call>' }}
{%- endfor %}""")

GLM_47 = GLM.replace("\\n", "")

PYTHONIC = _reply("""\
{{- ('\\n' if message.content else '') + '[' }}
{%- for call in message.tool_calls %}{%- set call = call.function %}
{{- call.name + '(' }}
{%- for key, value in call.arguments | items %}
{{- key + '=' + ((value | string) if value in (true, false, none) else (value | tojson)) }}
{{- ', ' if not loop.last }}
{%- endfor %}
{{- ')' + (', ' if not loop.last else ']') }}
{%- endfor %}""")

PYTHONIC_TOKENS = PYTHONIC.replace(
    "('\\n' if message.content else '') + '['", "'<|tool_call_start|>['"
).replace("else ']')", "else ']<|tool_call_end|>')")

CALL_TEMPLATES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "hermes": ("hermes", HERMES),
        "qwen3-coder": ("qwen3-coder", QWEN_CODER),
        "llama3": ("llama3", LLAMA3),
        "llama3 with its token": ("llama3", LLAMA3_TAG),
        "mistral": ("mistral", MISTRAL),
        "mistral-args": ("mistral-args", MISTRAL_ARGS),
        "mistral-call-id": ("mistral-call-id", MISTRAL_CALL_ID),
        "deepseek-v3": ("deepseek-v3", DEEPSEEK_V3),
        "deepseek-v3.1": ("deepseek-v3.1", DEEPSEEK_V31),
        "glm": ("glm", GLM),
        "glm-4.7": ("glm-4.7", GLM_47),
        "pythonic": ("pythonic", PYTHONIC),
        "pythonic with its tokens": ("pythonic", PYTHONIC_TOKENS),
    }
)
"""By what is tested, the parser's name and the template."""


def written(template: str, calls: list[tuple[str, dict[str, Any]]], content: str = "") -> str:
    """A reply with calls, by name and arguments, as a template writes it."""
    tool_calls = [
        {
            "id": f"call{index:05}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for index, (name, arguments) in enumerate(calls)
    ]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": content, "tool_calls": tool_calls},
    ]
    return ChatTemplate(template, {}).render(messages, add_generation_prompt=False)
