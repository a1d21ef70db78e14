"""A conversation as tokens, and which of them are learnt.

The chat is written once for each turn of the assistant, up to where it begins and up to where it
ends. What is between the two is learnt: it is what the engine would have to sample. That needs a
template which only ever appends, which is looked at for every conversation: templates that drop
earlier reasoning, or write a last turn in another way, do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidRequest
from engine.protocol import IntArray
from recipes.collecting.prompts import plain_text
from recipes.data.chat_style import ChatStyle
from recipes.data.data_options import TrainOn
from recipes.types import BoolArray, Message, Trajectory
from rollout.offline import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation. token_ids: int32 [len]. learnt: bool [len], the assistant's tokens; the
    first token is never one, and one at least is."""

    token_ids: IntArray
    learnt: BoolArray

    @property
    def num_learnt(self) -> int:
        """Tokens that have a part in the loss."""
        return int(self.learnt.sum())

    @property
    def first(self) -> int:
        """Place of the first of them."""
        return int(self.learnt.argmax())

    def trajectory(self) -> Trajectory:
        """As trainers take it: all from the first learnt token on is the response."""
        response = self.token_ids[self.first :]
        return Trajectory(
            prompt_ids=self.token_ids[: self.first],
            response_ids=response,
            rollout_logprobs=np.zeros(len(response), dtype=np.float32),
            spans=(),
            text="",
            truncated=False,
            reward=0.0,
            correct=0.0,
        )

    def kept(self) -> BoolArray:
        """bool [response_len] of `trajectory`: the learnt tokens."""
        return self.learnt[self.first :]


@dataclass(frozen=True, kw_only=True)
class ExampleWriter:
    """Writes conversations for one model. train_on: which turns of the assistant are learnt."""

    tokenizer: Tokenizer
    style: ChatStyle
    train_on: TrainOn = "all"

    def example(self, messages: Sequence[Message]) -> Example:
        """The tokens of a conversation that ends with the assistant's turn.

        Raises InvalidRequest for one that the template refuses, or does not write by appending.
        """
        chat = self.style.led(messages)
        turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        if self.train_on == "last":
            turns = turns[-1:]
        text, ids, learnt = "", np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_)
        for turn in turns:
            for stop, is_reply in ((turn, False), (turn + 1, True)):
                longer = self._render(chat[:stop], is_open=not is_reply)
                if not longer.startswith(text):
                    raise _rewrites(turn, is_reply)
                new = self._continued(ids, text, longer)
                ids = np.concatenate([ids, new])
                learnt = np.concatenate([learnt, self._to_its_end(new, is_reply)])
                text = longer
        if not learnt.any() or learnt[0]:
            raise InvalidRequest("has no tokens for this model before, or in, the assistant's turn")
        return Example(token_ids=ids, learnt=learnt)

    def ends_turns(self) -> bool:
        """Whether the assistant's turn ends with a token that ends a reply of this model."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        if self.tokenizer.chat_template is None:
            return True
        example = ExampleWriter(tokenizer=self.tokenizer, style=ChatStyle()).example(chat)
        return bool(np.isin(example.token_ids[example.learnt], self.tokenizer.eos_ids).any())

    def _render(self, chat: Sequence[Message], *, is_open: bool) -> str:
        if self.tokenizer.chat_template is None:
            return plain_text(chat)
        return self.tokenizer.render_chat(
            chat, add_generation_prompt=is_open, **self.style.variables
        )

    def _continued(self, ids: IntArray, text: str, longer: str) -> IntArray:
        """The tokens by which `longer` goes on after `text`, whose tokens are `ids`."""
        # A template writes every special token itself.
        begins = self.tokenizer.chat_template is None
        whole = np.asarray(self.tokenizer.encode(longer, add_special_tokens=begins), dtype=np.int32)
        if np.array_equal(whole[: len(ids)], ids):
            return whole[len(ids) :]
        # A token reaches over the seam: a reply could not begin with it.
        rest = self.tokenizer.encode(longer[len(text) :], add_special_tokens=False)
        return np.asarray(rest, dtype=np.int32)

    def _to_its_end(self, ids: IntArray, is_reply: bool) -> BoolArray:
        """What is learnt of a piece: of a reply, all up to the first token that ends one."""
        if not is_reply:
            return np.zeros(len(ids), dtype=np.bool_)
        ends = np.flatnonzero(np.isin(ids, self.tokenizer.eos_ids))
        last = int(ends[0]) if len(ends) else len(ids) - 1
        return np.arange(len(ids)) <= last


def _rewrites(turn: int, is_reply: bool) -> InvalidRequest:
    """The error for a template that does not append."""
    if is_reply:
        return InvalidRequest(
            f"the chat template of this model begins message {turn} in another way than it asks "
            "for a reply, so that what would be learnt is not what would be sampled; see whether "
            "--chat-template-kwargs can turn that off",
            field="chat_template_kwargs",
        )
    return InvalidRequest(
        f"the chat template of this model writes the turns before message {turn} anew once that "
        "is there, so that what would be learnt is not what would be sampled; learn the last turn "
        "alone with --train-on last",
        field="train_on",
    )
