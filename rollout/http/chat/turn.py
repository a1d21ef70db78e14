"""Run one turn: a chat body in, what its replies hold out.

OpenAI's chat, its responses and Anthropic's messages are this turn in three spellings: each
translates its body into a `ChatBody`, and the events of a `Turn` into its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

import msgspec

from engine.errors import InvalidRequest
from engine.protocol import GenerateRequest
from rollout.http.chat.constraint import ThinkingMarks, turn_grammar
from rollout.http.chat.prompts import ChatPrompt, ChatPrompts
from rollout.http.chat.reader import ReplyReader
from rollout.http.chat.tool_choice import ToolChoice, tool_choice
from rollout.http.native.sample import Sample, SampleDelta
from rollout.http.openai.bodies import ChatBody, base_request
from rollout.http.openai.call import OpenAICall, start
from rollout.http.services import Services
from rollout.parsers.events import Event, Reply, ReplyParser
from rollout.parsers.formats import REASONING_PARSERS, ReplyFormat
from rollout.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnDelta:
    """What one output added to reply `index`. events: in their order."""

    index: int
    sample: Sample
    delta: SampleDelta
    events: list[Event]


class Turn:
    """The replies to one chat body, `n` of them.

    readers: one for each sample of the call. thinking_end: the tokens that end a thinking block;
    none for a family that does not think.
    """

    def __init__(
        self, call: OpenAICall, readers: Sequence[ReplyReader], thinking_end: Sequence[int]
    ) -> None:
        self.call = call
        self._readers = readers
        self._thinking_end = list(thinking_end)

    @property
    def is_plain(self) -> bool:
        """Whether replies are content alone, whatever they say."""
        return all(reader.is_plain for reader in self._readers)

    async def finish(self) -> list[list[Event]]:
        """Run to the end; the events of all replies, in the order of the samples."""
        with _speaking_of_tools():
            return await self.call.choices(self._whole)

    async def deltas(self) -> AsyncGenerator[TurnDelta, None]:
        """What every output added, until all replies are whole. Whoever iterates closes it."""
        with _speaking_of_tools():
            async with aclosing(self.call.outputs()) as outputs:
                async for index, sample, delta in outputs:
                    events = self._readers[index].read(delta.text, last=delta.finished)
                    yield TurnDelta(index=index, sample=sample, delta=delta, events=events)

    def reply(self, index: int = 0) -> Reply:
        """What reply `index` holds, as far as it was read."""
        return self._readers[index].reply()

    def num_reasoning_tokens(self) -> int:
        """Output tokens of all replies up to the ends of their thinking."""
        return sum(
            _num_until(self._thinking_end, sample.output.token_ids.tolist())
            for index, sample in enumerate(self.call.samples)
            if self.reply(index).reasoning
        )

    def _whole(self, sample: Sample, index: int) -> list[Event]:
        return self._readers[index].whole(sample.text)


async def start_turn(
    services: Services,
    prompts: ChatPrompts | None,
    body: ChatBody,
    num_bytes: int,
    *,
    prefix: str,
    object_name: str,
) -> Turn:
    """Check a body and expand it into samples; nothing is submitted yet.

    num_bytes: of the body that came. prefix: of the ids that replies get. Raises InvalidRequest and
    its kinds, with the names that OpenAI's chat gives the fields.
    """
    if prompts is None:
        raise InvalidRequest("this model has no tokenizer; send ids to /generate", field="messages")
    choice = tool_choice(body)
    prompt = await prompts.prompt(body, num_bytes)
    reply_format = prompts.reply_format(body, forced=choice.forced)
    marks = _thinking_marks(reply_format, prompt.text, prompts.tokenizer)
    grammar = turn_grammar(body, choice, reply_format, marks)
    read = _read_format(body, choice, reply_format)
    item = _item(services, body, prompt, keep_special=read.keeps_special_tokens)
    item = msgspec.structs.replace(item, grammar=grammar)
    if services.capture is not None:
        services.capture.conversing(body)
    with _speaking_of_tools():
        call = await start(services, body, [item], prefix=prefix, object_name=object_name)
    hides = read.keeps_special_tokens and body.skip_special_tokens
    readers = [
        ReplyReader(
            _parser(body, choice, read, prompt),
            parallel=choice.parallel,
            hidden=prompts.tokenizer.special_texts if hides else (),
            with_reasoning=body.include_reasoning,
        )
        for _ in call.samples
    ]
    turn = Turn(call, readers, [] if marks is None else marks.end_ids)
    if services.capture is not None:
        services.capture.replying(turn.reply)
    return turn


def _thinking_marks(
    reply_format: ReplyFormat, prompt: str, tokenizer: Tokenizer
) -> ThinkingMarks | None:
    """The marks of the thinking that a reply may begin with; None where the family does not think,
    or the prompt has closed the block already."""
    name, closing = reply_format.reasoning_parser, reply_format.thinking_end_text
    if name is None or closing is None or prompt[-256:].rstrip().endswith(closing):
        return None
    opening = REASONING_PARSERS[name].opening
    ids = {mark: tokenizer.special_token_id(mark) for mark in (opening, closing)}
    return ThinkingMarks(
        opening=None if reply_format.prompt_ends_in_thinking(prompt) else opening,
        closing=closing,
        end_ids=tokenizer.encode(closing, add_special_tokens=False),
        special={mark: token_id for mark, token_id in ids.items() if token_id is not None},
    )


def _read_format(body: ChatBody, choice: ToolChoice, reply_format: ReplyFormat) -> ReplyFormat:
    """What is looked for in the reply."""
    return replace(
        reply_format,
        tool_parser=None if choice.mode == "none" else reply_format.tool_parser,
        reasoning_parser=reply_format.reasoning_parser if body.separate_reasoning else None,
    )


def _parser(
    body: ChatBody, choice: ToolChoice, read: ReplyFormat, prompt: ChatPrompt
) -> ReplyParser | None:
    if read.tool_parser is None and read.reasoning_parser is None:
        return None
    tools = [] if choice.mode == "none" else body.tools or []
    return read.parser(tools, read.prompt_ends_in_thinking(prompt.text))


def _item(
    services: Services, body: ChatBody, prompt: ChatPrompt, *, keep_special: bool
) -> GenerateRequest:
    facts = services.engine.facts
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    base = base_request(
        msgspec.structs.replace(body, skip_special_tokens=False) if keep_special else body,
        max_tokens=facts.context_length if limit is None else limit,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        vocab_size=facts.vocab_size,
    )
    return msgspec.structs.replace(base, input_ids=prompt.ids)


@contextmanager
def _speaking_of_tools() -> Iterator[None]:
    """Errors of a grammar that no field of the body names: it was made of the tools."""
    try:
        yield
    except InvalidRequest as error:
        if error.field not in ("grammar", "grammar.source"):
            raise
        raise type(error)(error.message.replace(error.field, "tools", 1), field="tools") from error


def _num_until(end: list[int], ids: list[int]) -> int:
    """How many of `ids` there are up to the first occurrence of `end`, that included; all where
    there is none."""
    start = -1
    while end and end[0] in ids[start + 1 :]:
        start = ids.index(end[0], start + 1)
        if ids[start : start + len(end)] == end:
            return start + len(end)
    return len(ids)
