"""Array types, the ranges of numbers and lists, and the words that fields of messages may hold.

A range is what the field's storage holds: an int32 table, an int64 tensor, float32 arithmetic, a
port. It stands in the type, so that decoding checks it wherever a message comes from bytes;
`ranges.check_ranges` checks a message that was built in this process. What a number means (a
negative temperature, a token beyond the vocabulary) is checked by who knows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

IntArray = np.ndarray[Any, np.dtype[np.int32]]

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

BitArray = np.ndarray[Any, np.dtype[np.uint32]]
"""Bits of tokens: token t is bit t % 32, from the lowest, of word t // 32."""

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_TINY = 2.0**-126
"""Smallest number that float32 holds with full precision; GPUs take smaller ones for 0."""

MAX_SECONDS = 1e9
"""Longest deadline that a message may state; `deadlines.MAX_TIMEOUT_S` is where it is cut."""

MAX_STOPS = 128
"""Most stop strings of a request."""

MAX_STOP_CHARS = 1024
"""Longest stop string."""

MAX_TOKEN_LIST = 1024
"""Most `stop_token_ids` and most `logit_bias` entries of a request: the device and every step
look at all of them."""

MAX_ALLOWED_IDS = 1 << 15
"""Most `allowed_token_ids` of a request; the device sees a bit for every token of the vocabulary,
however many are allowed."""

MAX_GRAMMAR_CHARS = 1 << 18
"""Longest source of a grammar: it travels with every sample that it constrains."""

MAX_TENSORS = 1 << 20
"""Most tensors of a manifest or a transfer."""

MAX_VALUES = 100_000
"""Most elements of a tensor that are shown."""

# Numbers. Each name says what is counted; the range is that of the narrowest place it reaches.
Count = Annotated[int, Meta(ge=0, le=INT32_MAX)]
TokenCount = Annotated[int, Meta(ge=1, le=INT32_MAX)]
"""Tokens, rows, pages: int32 tables."""

Int32 = Annotated[int, Meta(ge=-(2**31), le=INT32_MAX)]
"""What reaches an int32 table; which of these numbers mean something is checked by
`rollout/scheduler/validate.py`."""

Int64 = Annotated[int, Meta(ge=-(2**63), le=INT64_MAX)]
"""Anything an int64 holds: priorities, seeds as callers write them."""

Size = Annotated[int, Meta(ge=0, le=INT64_MAX)]
"""Bytes, offsets, elements, counters that only grow."""

NumSteps = Annotated[int, Meta(ge=1, le=INT32_MAX)]
"""Steps to do something for."""

PositiveSize = Annotated[int, Meta(ge=1, le=1 << 40)]
"""Bytes of a bucket."""

Position64 = Annotated[int, Meta(ge=-1, le=INT64_MAX)]
"""An element of a tensor, or -1 for its end."""

MAX_VERSION = 2**53
"""Largest version: every number of JSON up to it is exact, and counting on from it still fits."""

Version = Annotated[int, Meta(ge=0, le=MAX_VERSION)]
"""A version of the weights."""

Owner = Annotated[str, Meta(max_length=256)]
"""What whoever begins an update draws for it, such as a UUID; "" for callers that draw none."""

Checksum = Annotated[int, Meta(ge=0)]
"""An unsigned 64-bit checksum. msgspec knows no bound above int64: MessagePack ends at 2^64."""

Port = Annotated[int, Meta(ge=0, le=65535)]

GroupSize = Annotated[int, Meta(ge=1, le=1 << 20)]
"""Ranks of a process group."""

Rank = Annotated[int, Meta(ge=0, le=1 << 20)]
"""A rank of a process group."""

Seconds = Annotated[float, Meta(gt=0, le=MAX_SECONDS)]
"""A deadline."""

Patience = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
"""How long to try again; 0 for once."""

Float32 = Annotated[float, Meta(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]
"""Any finite float32."""

Penalty = Annotated[float, Meta(ge=-1e6, le=1e6)]
"""Times a count of tokens, it stays finite in float32."""

Bias = Annotated[float, Meta(le=1e9)]
"""Added to a logit; -inf, which JSON cannot write, bans the token."""

NumValues = Annotated[int, Meta(ge=0, le=MAX_VALUES)]
"""Elements of a tensor that travel in a reply."""

# Text and lists.
Name = Annotated[str, Meta(max_length=1024)]
"""A tensor, a group, an address, a dtype."""

Path = Annotated[str, Meta(max_length=4096)]

ClientId = Annotated[str, Meta(max_length=256)]
"""The id that a client gives a request."""

RequestId = Annotated[str, Meta(max_length=512)]
"""The id of one sequence: a client's id and the number of the sample."""

RequestIds = Annotated[list[RequestId], Meta(max_length=1 << 20)]

Salt = Annotated[str, Meta(max_length=4096)]

CacheKey = Annotated[str, Meta(max_length=8300)]
"""Two salts in one."""

Message = Annotated[str, Meta(max_length=4096)]

StopString = Annotated[str, Meta(max_length=MAX_STOP_CHARS)]

StopStrings = Annotated[list[StopString], Meta(max_length=MAX_STOPS)]

TokenIds = Annotated[list[Int32], Meta(max_length=MAX_TOKEN_LIST)]

StopIds = Annotated[list[Int32], Meta(max_length=2 * MAX_TOKEN_LIST)]
"""`stop_token_ids` and what a server adds: the model's EOS ids, stop strings that are tokens."""

GrammarSource = Annotated[str, Meta(max_length=MAX_GRAMMAR_CHARS)]

AllowedIds = Annotated[list[Int32], Meta(max_length=MAX_ALLOWED_IDS)]

OutputIds = list[Int32 | list[Int32]]
"""Output tokens of the one sample of a request, or a list for each of its samples. How many there
may be depends on the model's context."""

LogitBias = Annotated[dict[Int32, Bias], Meta(max_length=MAX_TOKEN_LIST)]

Names = Annotated[list[Name], Meta(max_length=MAX_TENSORS)]

Label = Annotated[str, Meta(max_length=256)]
"""What a trainer calls a version."""

Shape = Annotated[list[Size], Meta(max_length=16)]

Shapes = Annotated[list[Shape], Meta(max_length=MAX_TENSORS)]

Payloads = Annotated[list[bytes], Meta(max_length=4096)]
"""One a rank."""

Handle = Annotated[bytes, Meta(max_length=4096)]
"""What a driver gives to be opened in another process."""

PauseMode = Literal["abort", "retract", "keep"]

KvPolicy = Literal["keep", "recompute", "fresh"]

Task = Literal["generate", "classify", "embed"]

Pooling = Literal["last", "mean"]
"""Which hidden states of a prompt its embedding is made of."""

GrammarKind = Literal[
    "json_schema", "json_object", "regex", "ebnf", "lark", "choice", "structural_tag"
]

LogprobLaw = Literal["model", "masked"]
"""Whose logprobs, of tokens that a mask restricts: the model's over the whole vocabulary, or those
of the draw, over the tokens that may come."""

MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]

MemoryTags = Annotated[list[MemoryTag], Meta(max_length=16)]

Rendezvous = Literal["torch", "vllm"]

BroadcastLayout = Literal["tensors", "flat", "buckets", "chunks"]

StagingMode = Literal["auto", "shadow", "undo", "in_place"]

ProfileActivity = Literal["cpu", "gpu"]

CheckAction = Literal["checksum", "layout", "snapshot", "reset_tensors", "compare"]

FinishType = Literal["stop", "length", "abort", "hold"]
"""hold: the request asked to end there, and may be continued."""
