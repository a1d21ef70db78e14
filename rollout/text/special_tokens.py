"""The tokens with a role, as strings and ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import tokenizers
from tokenizers.processors import TemplateProcessing


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Strings of the tokens that have a role; None where the model has none.

    others: tokens of further roles by the names that templates use ("image_token").
    eos_ids: every id that ends a sequence; the EOS token and those a generation config adds.
    """

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)
    eos_ids: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, str]:
        """Names as Hugging Face spells them; roles nobody has are left out."""
        roles = {"bos_token": self.bos, "eos_token": self.eos}
        roles |= {"unk_token": self.unk, "pad_token": self.pad}
        return {name: token for name, token in roles.items() if token is not None} | {**self.others}


def wrap_with_special(
    backend: tokenizers.Tokenizer, special: SpecialTokens, *, bos: bool, eos: bool
) -> None:
    """Make `backend` put BOS before and EOS after each text that is encoded with special
    tokens, in place."""
    first = [special.bos] if bos and special.bos is not None else []
    last = [special.eos] if eos and special.eos is not None else []
    named = [(token, backend.token_to_id(token)) for token in {*first, *last}]
    single = " ".join([*first, "$A", *last])
    pair = f"{single} " + " ".join([*(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)])
    backend.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=named)
