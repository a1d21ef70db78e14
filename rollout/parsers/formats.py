"""How the replies of a model are written: told by its chat template, or by the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from engine.errors import InvalidRequest, UnsupportedOption
from engine.protocol import Grammar
from rollout.parsers.calls import CallParser
from rollout.parsers.events import ReplyParser
from rollout.parsers.families.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from rollout.parsers.families.family import Family
from rollout.parsers.families.glm import GLM, GLM_47
from rollout.parsers.families.hermes import HERMES
from rollout.parsers.families.llama import LLAMA3
from rollout.parsers.families.mistral import MISTRAL, MISTRAL_ARGS, MISTRAL_CALL_ID
from rollout.parsers.families.pythonic import PYTHONIC
from rollout.parsers.families.qwen_coder import QWEN_CODER
from rollout.parsers.functions import offered_functions
from rollout.parsers.reasoning import PlainParser, ReasoningParser, Thinking
from rollout.parsers.rules.lark import Lark
from rollout.parsers.template_marks import told_reasoning_parser, told_tool_parser

T = TypeVar("T")

OFF = "none"
"""What turns a parser off."""

TOOL_PARSERS: Mapping[str, Family] = MappingProxyType(
    {
        "deepseek-v3": DEEPSEEK_V3,
        "deepseek-v3.1": DEEPSEEK_V31,
        "glm": GLM,
        "glm-4.7": GLM_47,
        "hermes": HERMES,
        "llama3": LLAMA3,
        "mistral": MISTRAL,
        "mistral-args": MISTRAL_ARGS,
        "mistral-call-id": MISTRAL_CALL_ID,
        "pythonic": PYTHONIC,
        "qwen3-coder": QWEN_CODER,
    }
)

REASONING_PARSERS: Mapping[str, Thinking] = MappingProxyType(
    {
        "deepseek-r1": Thinking(opening="<think>", closing="</think>", always=True),
        "glm": Thinking(opening="<think>", closing="</think>"),
        "mistral": Thinking(opening="[THINK]", closing="[/THINK]"),
        "qwen3": Thinking(opening="<think>", closing="</think>"),
    }
)

# Other servers' names of the same parsers.
_TOOL_ALIASES = {
    "deepseekv3": "deepseek-v3",
    "deepseekv31": "deepseek-v3.1",
    "deepseek-v31": "deepseek-v3.1",
    "glm45": "glm",
    "glm47": "glm-4.7",
    "llama3-json": "llama3",
    "llama4-json": "llama3",
    "llama4-pythonic": "pythonic",
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3-xml": "qwen3-coder",
}
_REASONING_ALIASES = {"deepseek-v3": "qwen3", "deepseek-v31": "qwen3", "glm45": "glm"}


@dataclass(frozen=True, kw_only=True)
class ReplyFormat:
    """How replies are written. tool_parser, reasoning_parser: names of `TOOL_PARSERS` and
    `REASONING_PARSERS`; None where nothing is looked for. special_token_id: of a text that is a
    special token of the model, its id, else None; without it, markers are what they are in the
    family's own models."""

    tool_parser: str | None
    reasoning_parser: str | None
    special_token_id: Callable[[str], int | None] | None = None

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether the text that is parsed must be decoded with its special tokens."""
        family, thinking = self._family, self._thinking
        markers = family.markers if family is not None else ()
        if thinking is not None:
            markers = (*markers, thinking.opening, thinking.closing)
        if self.special_token_id is not None:
            return any(self.special_token_id(marker) is not None for marker in markers)
        return (family is not None and family.special) or self.reasoning_parser == "mistral"

    @property
    def thinking_end_text(self) -> str | None:
        """What closes a thinking block; None where there are none."""
        return None if self._thinking is None else self._thinking.closing

    def prompt_ends_in_thinking(self, prompt: str) -> bool:
        """Whether the reply to a prompt begins within a thinking block: the prompt opened one, or
        the family's replies always begin there."""
        thinking = self._thinking
        if thinking is None:
            return False
        end = prompt[-256:].rstrip()
        return end.endswith(thinking.opening) or (
            thinking.always and not end.endswith(thinking.closing)
        )

    def parser(
        self, tools: Sequence[Mapping[str, Any]], prompt_ends_in_thinking: bool
    ) -> ReplyParser:
        """What reads one reply. tools: those that may be called, as clients send them; without any
        there are no calls. Raises InvalidRequest as `offered_functions`."""
        functions = offered_functions(tools)
        parser: ReplyParser = PlainParser()
        if self._family is not None and functions:
            syntax = self._family.syntax(functions)
            parser = CallParser(syntax, functions.keys(), self._family.new_id)
        if self._thinking is not None:
            parser = ReasoningParser(self._thinking, parser, is_open=prompt_ends_in_thinking)
        return parser

    def force(
        self, tools: Sequence[Mapping[str, Any]], choice: str | None, parallel: bool
    ) -> Grammar:
        """The language whose texts are calls in the family's form, with arguments that fit the
        schemas of the functions.

        choice: the name of the function that is called, once; None for a call of any of `tools`,
        or with `parallel` several. Raises InvalidRequest (`tool_choice`) for a
        function that is not among the tools, UnsupportedOption for a model whose calls have no
        known form, InvalidRequest (`tools`) for a schema that is not served.
        """
        family, functions = self._family, offered_functions(tools)
        if family is None:
            raise UnsupportedOption(
                "the chat template of this model does not tell how calls are written; start the "
                f"server with --tool-parser, one of {', '.join(sorted(TOOL_PARSERS))}",
                field="tool_choice",
            )
        if not functions:
            raise InvalidRequest("tool_choice needs tools; send some", field="tool_choice")
        if choice is not None and choice not in functions:
            raise InvalidRequest(
                f"tool_choice is {choice[:100]!r}, which is none of the tools",
                field="tool_choice",
            )
        offered = functions if choice is None else {choice: functions[choice]}
        lark = Lark(self._special_ids(family.markers))
        start = family.grammar(lark, offered, parallel and choice is None)
        return Grammar(kind="lark", source=lark.source(start))

    def _special_ids(self, markers: Sequence[str]) -> dict[str, int]:
        if self.special_token_id is None:
            return {}
        found = {marker: self.special_token_id(marker) for marker in markers}
        return {marker: token_id for marker, token_id in found.items() if token_id is not None}

    @property
    def _family(self) -> Family | None:
        return None if self.tool_parser is None else TOOL_PARSERS[self.tool_parser]

    @property
    def _thinking(self) -> Thinking | None:
        return None if self.reasoning_parser is None else REASONING_PARSERS[self.reasoning_parser]


def select_format(
    template_source: str | None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    *,
    special_token_id: Callable[[str], int | None] | None = None,
) -> ReplyFormat:
    """The format of a model's replies.

    template_source: the model's chat template, that of conversations with tools where it has two;
    what it writes for calls and thinking says how replies write them. tool_parser,
    reasoning_parser: what the command line names instead; "none" turns one off. special_token_id:
    as in `ReplyFormat`. Raises InvalidRequest (`--tool-parser`, `--reasoning-parser`) for a name
    that there is not.
    """
    text = template_source or ""
    tools = _named(tool_parser, TOOL_PARSERS, _TOOL_ALIASES, "--tool-parser")
    reasoning = _named(
        reasoning_parser, REASONING_PARSERS, _REASONING_ALIASES, "--reasoning-parser"
    )
    return ReplyFormat(
        tool_parser=told_tool_parser(text) if tools is None else tools or None,
        reasoning_parser=told_reasoning_parser(text) if reasoning is None else reasoning or None,
        special_token_id=special_token_id,
    )


def _named(
    name: str | None, table: Mapping[str, T], aliases: Mapping[str, str], option: str
) -> str | None:
    """A name of `table`; "" for none, None where nothing is named."""
    if not name:
        return None
    plain = name.replace("_", "-")
    if plain == OFF:
        return ""
    plain = aliases.get(plain, plain)
    if plain not in table:
        names = ", ".join((*sorted(table), OFF))
        raise InvalidRequest(f"is {name[:100]}; give one of {names}", field=option)
    return plain
