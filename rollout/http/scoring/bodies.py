"""Bodies of routes that sample nothing, in the forms of OpenAI, vLLM, SGLang, Jina and Cohere."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from engine.protocol import ClassifyRequest, Pooling
from engine.protocol.types import ClientId, Int32, Int64, Message, Salt, TokenIds
from rollout.http.config import RerankForm


class _Common(msgspec.Struct, kw_only=True):
    """Options of every route; names and defaults of vLLM.

    truncate_prompt_tokens: most tokens of a prompt, -1 for as many as the context holds; longer
    ones are cut and not refused. truncation_side: what is cut off, the end or the beginning.
    """

    model: Message = ""
    add_special_tokens: bool = True
    truncate_prompt_tokens: Int32 | None = None
    truncation_side: Literal["left", "right"] = "right"
    priority: Int64 = 0
    cache_salt: Salt | None = None
    request_id: ClientId | None = None


class EmbeddingOptions(_Common, kw_only=True):
    """What /v1/embeddings takes beside its prompts.

    dimensions: the first so many numbers of each embedding. normalize: to length 1, behind that
    cut; vLLM calls it `use_activation`, which decides where it is given. pooling: as in `Request`.
    """

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Int32 | None = None
    normalize: bool = True
    use_activation: bool | None = None
    pooling: Pooling = "last"


class EmbeddingBody(EmbeddingOptions, kw_only=True):
    """POST /v1/embeddings: a text, a list of texts, ids, or a list of lists of ids."""

    input: msgspec.Raw


class EmbeddingChatBody(EmbeddingOptions, kw_only=True):
    """POST /v1/embeddings in vLLM's form for conversations: `messages` as the chat template writes
    them are the one prompt. Fields as in chat; the template writes special tokens by itself."""

    messages: list[dict[str, Any]]
    add_special_tokens: bool = False
    add_generation_prompt: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class EncodeRequest(ClassifyRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /encode, SGLang's form: fields as in `ClassifyRequest` and in `EmbeddingBody`; the last
    three are for all of a batch."""

    dimensions: Int32 | None = None
    normalize: bool = True
    pooling: Pooling = "last"


class PairBody(_Common, kw_only=True):
    """POST /v1/score in vLLM's form: each text of `text_1` with the one of `text_2` in its place,
    or the one with every other.

    use_activation: the score of a classifier is sigmoid(logit), else the logit. pooling: of a model
    that embeds, whose score is the cosine of two embeddings.
    """

    text_1: str | list[str]
    text_2: str | list[str]
    use_activation: bool = True
    pooling: Pooling = "last"


class LabelBody(_Common, kw_only=True):
    """POST /v1/score in SGLang's form: how likely each of `label_token_ids` is as the token behind
    the query and an item, both texts or both ids.

    apply_softmax: among the labels alone. item_first: the item stands before the query.
    """

    query: str | list[Int32]
    items: msgspec.Raw
    label_token_ids: TokenIds
    apply_softmax: bool = False
    item_first: bool = False


class RerankDocument(msgspec.Struct):
    """A document as Jina's API has it."""

    text: str


class RerankBody(_Common, kw_only=True):
    """POST /v1/rerank in the forms of Jina, Cohere and SGLang: the `top_n` documents that fit the
    query best, all for null and 0. form: of the reply, the server's for null. The rest as in
    `PairBody`, of the query and each document."""

    query: str
    documents: list[str | RerankDocument]
    top_n: Int32 | None = None
    return_documents: bool = True
    form: RerankForm | None = None
    use_activation: bool = True
    pooling: Pooling = "last"


class ClassifyBody(_Common, kw_only=True):
    """POST /classify in vLLM's form; `input` as in `EmbeddingBody`.

    use_activation: probabilities, a softmax over the labels and a sigmoid of a single one; else the
    logits.
    """

    input: msgspec.Raw
    use_activation: bool = True


class ClassifyChatBody(_Common, kw_only=True):
    """POST /classify in vLLM's form for conversations: `messages` as in `EmbeddingChatBody`,
    use_activation as in `ClassifyBody`."""

    messages: list[dict[str, Any]]
    add_special_tokens: bool = False
    add_generation_prompt: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    use_activation: bool = True


ChatForm = EmbeddingChatBody | ClassifyChatBody
Body = EmbeddingBody | PairBody | LabelBody | RerankBody | ClassifyBody | ChatForm
