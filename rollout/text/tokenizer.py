"""Text to ids and back, over the tokenizers library: transformers would bring torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from engine.errors import InvalidRequest, ModelError, ModelNotFound
from rollout.text.chat_template import ChatTemplate
from rollout.text.folder.json_files import broken
from rollout.text.gguf_keys import chat_templates
from rollout.text.gguf_metadata import read_gguf_metadata
from rollout.text.gguf_tokenizer import build_gguf_tokenizer
from rollout.text.hf_folder import read_hf_folder
from rollout.text.messages import Message
from rollout.text.special_tokens import SpecialTokens
from rollout.text.token_bytes import TokenBytes

logger = logging.getLogger(__name__)


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    eos_ids: every id that ends a sequence. bos_id: None where the model has no BOS.
    chat_template: that of conversations without tools; None where there is none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: SpecialTokens,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        """chat_template: the only one, or several by name: "default", and "tool_use" where
        conversations with tools have one of their own."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special = special
        self._bytes = TokenBytes(backend)
        given = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        self._sources: dict[str, str] = dict(given or {})
        self._templates: dict[str, ChatTemplate] = {}
        self.chat_template = self._sources.get("default")
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids = list(special.eos_ids)
        self.bos_id = None if special.bos is None else backend.token_to_id(special.bos)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; with special tokens, what the model's post-processor adds (a BOS
        for models trained with one). Other threads run meanwhile. Raises InvalidRequest
        (`prompt`) for text that the vocabulary cannot express."""
        try:
            # Unlike encode(), this lets go of the interpreter, and it computes no offsets.
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InvalidRequest(
                f"the tokenizer cannot encode this text: {error}", field="prompt"
            ) from error
        ids: list[int] = batch[0].ids
        return ids

    def encode_pair(
        self,
        first: str,
        second: str | None = None,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        keeps: Literal["first", "last"] = "first",
    ) -> list[int]:
        """Ids of two texts as the model's post-processor joins them, or of one.

        max_tokens: most ids that come; of `second`, else of the only text, the `keeps` tokens stay,
        and the special tokens do in any case. Raises InvalidRequest (`prompt`) as `encode` does,
        and where `first` of two leaves no room.
        """
        if max_tokens is not None:
            # A token stands for no more text than this, so that the rest could not be kept anyway.
            most = (max_tokens + 16) * self.longest_token_bytes
            part = slice(0, most) if keeps == "first" else slice(-most, None)
            first, second = (first[part], None) if second is None else (first, second[part])
        try:
            if max_tokens is None:
                texts: Any = [first] if second is None else [(first, second)]
                found = self._backend.encode_batch_fast(
                    texts, add_special_tokens=add_special_tokens
                )[0]
            else:
                plain = self._backend.encode_batch(
                    [first] if second is None else [first, second], add_special_tokens=False
                )
                found = self._cut(plain, max_tokens, keeps, add_special_tokens)
        except InvalidRequest:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InvalidRequest(
                f"the tokenizer cannot encode this text: {error}", field="prompt"
            ) from error
        ids: list[int] = found.ids
        return ids

    def _cut(
        self,
        plain: list[tokenizers.Encoding],
        max_tokens: int,
        keeps: Literal["first", "last"],
        add_special_tokens: bool,
    ) -> tokenizers.Encoding:
        """One text or two without special tokens, joined and in at most `max_tokens`."""
        room = max_tokens - sum(len(part.ids) for part in plain[:-1])
        if add_special_tokens:
            room -= self._backend.num_special_tokens_to_add(len(plain) > 1)
        if room < 1:
            raise InvalidRequest(
                f"{max_tokens} tokens leave no room for the text to cut; allow more", field="prompt"
            )
        plain[-1].truncate(room, direction="right" if keeps == "first" else "left")
        first, second = (plain[0], plain[1] if len(plain) > 1 else None)
        return self._backend.post_process(first, second, add_special_tokens)

    def decode(
        self,
        ids: Sequence[int] | np.ndarray[Any, Any],
        *,
        skip_special_tokens: bool = True,
    ) -> str:
        """Text of `ids`, exactly what they say: no cleaning of spaces afterwards. Bytes
        that are no UTF-8 become U+FFFD; ids beyond the vocabulary give nothing."""
        plain: Sequence[int] = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return self._backend.decode(plain, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes that one token stands for, maybe part of a character; none for an id beyond
        the vocabulary. first: where it begins a text, which SentencePiece writes without the
        token's space."""
        return self._bytes.of(token_id, first=first)

    def is_shown(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether `decode` looks at a token: it is in the vocabulary, and not skipped."""
        return self._bytes.is_shown(token_id, skip_special_tokens=skip_special_tokens)

    def added_bytes(self, *, skip_special_tokens: bool) -> Mapping[int, bytes]:
        """By id, the bytes that a token adds to a text that has begun; none if it is not
        shown."""
        return self._bytes.added(skip_special_tokens=skip_special_tokens)

    def special_token_id(self, text: str) -> int | None:
        """Id of the special token that is written `text`; None if it is not one."""
        return self._special_ids.get(text)

    @property
    def special_texts(self) -> Collection[str]:
        """Every special token, as it is written where text is decoded with them."""
        return self._special_ids.keys()

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the model's chat template writes it.

        Raises InvalidRequest if the model has no template, or the messages do not fit it.
        """
        return self.template_for(tools).render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of `render_chat`: the template writes every special token itself."""
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        return self.encode(text, add_special_tokens=False)

    def write_hf(self, folder: str | Path) -> None:
        """Save a Hugging Face tokenizer that `AutoTokenizer.from_pretrained` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"), pretty=False)
        roles = self._special.as_dict()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **roles,
        }
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", roles)
        for name, source in self._sources.items():
            path = folder / "additional_chat_templates" / f"{name}.jinja"
            if name == "default":
                path = folder / "chat_template.jinja"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source, "utf-8")

    @cached_property
    def longest_token_bytes(self) -> int:
        """At least the bytes of text that one token can stand for."""
        return max(len(token.encode()) for token in self.vocabulary)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token, added tokens included; a copy."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokens with a role by the names that templates use: `bos_token` and so on."""
        return self._special.as_dict()

    def template_for(self, tools: object | None) -> ChatTemplate:
        """The model's template for a conversation with `tools`, None being none.

        Raises InvalidRequest (`messages`) if it has none, (`chat_template`) if it does not parse.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            others = f" but {', '.join(sorted(self._sources))}" if self._sources else ""
            raise InvalidRequest(
                f"this model has no chat template{others}; send a plain prompt", field="messages"
            )
        if name not in self._templates:
            self._templates[name] = ChatTemplate(self._sources[name], self.special_tokens)
        return self._templates[name]

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        added = self._backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _from_folder(folder: Path) -> Tokenizer:
    parts = read_hf_folder(folder)
    try:
        return Tokenizer(parts.backend, parts.special, parts.templates)
    except ModelError as error:
        raise broken(folder / "tokenizer.json", error.field, f"- {error.message}") from error


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, a GGUF file, or the folder of a config.json.

    Raises ModelNotFound if nothing is there, ModelError if it cannot be rebuilt: of a folder a
    CheckpointError that names file and key.
    """
    path = Path(model)
    if path.is_dir() or path.suffix == ".json":
        return _from_folder(path if path.is_dir() else path.parent)
    if path.suffix == ".gguf":
        metadata = read_gguf_metadata(path)
        backend, special = build_gguf_tokenizer(metadata)
        return Tokenizer(backend, special, chat_templates(metadata))
    raise ModelNotFound(
        f"no model at {path}: give a Hugging Face folder, a .gguf file or a config.json of this "
        "machine; a name on a hub is not downloaded",
        field="model",
    )


def find_tokenizer(model: str | Path) -> Tokenizer | None:
    """The model's tokenizer, for `serve` and `offline`; None, with a warning, for a model that came
    without one: it is asked in ids. Raises ModelNotFound if there is no model either."""
    try:
        return load_tokenizer(model)
    except ModelNotFound:
        if not Path(model).exists():
            raise
        logger.warning("no tokenizer beside %s: only input_ids are served", model)
        return None
