"""A byte-level tokenizer of 300 ids that needs no download.

Ids 0..93 are the printable ASCII characters from "!" on, 0..255 some byte each; 256 is
"<|bos|>", 257 "<|im_start|>", 258 "<|im_end|>", 259..298 reserved, 299 "<|eos|>".
"""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from rollout.text.special_tokens import SpecialTokens, wrap_with_special
from rollout.text.tokenizer import Tokenizer

BOS_ID, IM_START_ID, IM_END_ID, EOS_ID = 256, 257, 258, 299
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(*, add_bos: bool = False, template: str | None = TEMPLATE) -> Tokenizer:
    """A fresh tokenizer; `add_bos` makes `encode` put "<|bos|>" first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
    names += [f"<|reserved_{i}|>" for i in range(259, 299)] + ["<|eos|>"]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    special = SpecialTokens(bos="<|bos|>", eos="<|eos|>", eos_ids=[EOS_ID])
    wrap_with_special(backend, special, bos=add_bos, eos=False)
    return Tokenizer(backend, special, template)


def ids_of(text: str) -> list[int]:
    """Ids of printable ASCII text."""
    return [ord(char) - 33 for char in text]
