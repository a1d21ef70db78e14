"""Small chat templates of the kinds that models bring, and a conversation with tool calls."""

from __future__ import annotations

from typing import Any

QWEN25 = """\
{%- if tools %}
<|im_start|>system
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role in ('user', 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Content is read where it is true, arguments go through `tojson`."""

LLAMA3 = """\
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start|>system\\n' + system }}
{%- if tools is not none %}{{- '\\nEnvironment: ipython' }}{%- endif %}
{{- '<|eot|>' }}
{%- for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start|>' + message.role + '\\n' + message.content | trim + '<|eot|>' }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start|>assistant\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- '}<|eot|>' }}
{%- else %}
{{- '<|start|>ipython\\n' }}
{%- if message.content is iterable and message.content is not string %}
{{- message.content | tojson }}
{%- else %}{{- message.content }}{%- endif %}
{{- '<|eot|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}"""
"""`'tool_calls' in message` decides, and content is read where it is not."""

UNGUARDED = """\
{%- for message in messages %}
{{- '[' + message['role'] + ']' + message['content'] | trim }}
{%- if message['tool_calls'] is defined %}
{%- for call in message['tool_calls'] %}
{{- '<call ' + call['function']['name'] + ' ' }}
{{- call['function']['arguments'] | tojson + '>' }}
{%- endfor %}
{%- endif %}
{%- endfor %}"""
"""Reads content in every turn; None would come out as the word None."""

ADDED = UNGUARDED.replace("message['content'] | trim", "message['content']")
"""As above; None would end the rendering."""

TOLD_BY_NONE = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' and message['content'] is none %}
{%- for call in message['tool_calls'] %}
{{- '<call ' + call['function']['name'] + '\\n' + call['function']['arguments'] + '>' }}
{%- endfor %}
{%- elif message['role'] == 'tool' %}
{{- '<result>' + message['content'] }}
{%- else %}
{{- '<' + message['role'] + '>' + message['content'] }}
{%- endif %}
{%- endfor %}"""
"""DeepSeek-V3's kind: content that is none tells a turn with calls, arguments are text."""

PARTS = """\
{%- for message in messages %}
{{- '[' + message.role + ']' }}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{- part.text }}{%- endif %}
{%- endfor %}
{%- endfor %}"""
"""Content is a list of parts, never text, as models with images have it."""

NAMED_RESULTS = """\
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- '<result ' + message.name + '>' + message.content }}
{%- elif message.tool_calls %}{{- '<call ' + message.tool_calls[0].function.name }}
{{- message.tool_calls[0].function.arguments | tojson }}
{%- else %}{{- message.content }}{%- endif %}
{%- endfor %}"""
"""A tool's turn is told by the name of the function, which OpenAI's turns have not."""

ARGUMENTS = '{"city": "Zürich", "days": 2, "hourly": null}'

TOOL_LOOP: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}],
    },
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [
            {
                "id": "call00001",
                "type": "function",
                "index": None,
                "function": {"name": "forecast", "arguments": ARGUMENTS},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "content": [{"type": "text", "text": "rain"}]},
]
"""What an agent's loop sends after one call: an assistant's `model_dump()` of the OpenAI package
between turns of its own."""
