"""What a reward model reads: the chat and its reply, as its own tokenizer writes them."""

from __future__ import annotations

import numpy as np

from engine.errors import InvalidRequest
from engine.protocol import IntArray
from recipes.collecting.prompts import plain_text
from recipes.rewards.base import Failed, Item
from rollout.offline import Tokenizer


class ModelChat:
    """Writes graded replies for one reward model, each once, by its own chat template.

    A tokenizer that begins texts with a BOS gets exactly one, whether the template writes it, the
    tokenizer adds it, or both would. Without a template the reply stands behind its question, as
    the policy wrote it, and ends its line.

    context_length: tokens that the model reads at most; None leaves that to whoever serves it.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        begins_with = tokenizer.encode("a")[:1]
        self._adds_bos = tokenizer.bos_id is not None and begins_with == [tokenizer.bos_id]

    def ids(self, item: Item) -> IntArray | Failed:
        """int32 [n], the tokens to be scored at the last of them; or why the reply has none."""
        try:
            ids = self._one_bos(self._encoded(item))
        except InvalidRequest as error:
            return Failed(kind="raised", reason=f"the reward model cannot read it: {error.message}")
        if self._context_length is not None and len(ids) > self._context_length:
            return Failed(
                kind="too_long",
                reason=f"chat and reply have {len(ids)} tokens; the reward model reads "
                f"{self._context_length}",
            )
        return np.array(ids, np.int32)

    def _encoded(self, item: Item) -> list[int]:
        """Ids as the template writes them, without what the tokenizer would add."""
        if self._tokenizer.chat_template is None:
            text = f"{plain_text(item.messages)}{item.reply}\n"
            return self._tokenizer.encode(text, add_special_tokens=False)
        messages = [*item.messages, {"role": "assistant", "content": item.reply}]
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=False)

    def _one_bos(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_id
        start = 0
        while start < len(ids) and ids[start] == bos:
            start += 1
        if bos is None or not (start or self._adds_bos):
            return ids
        return [bos, *ids[start:]]
