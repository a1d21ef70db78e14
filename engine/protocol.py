"""Every message of the project, as typed msgspec structs: no torch, no pickle.

Three layers speak them, in the order a request meets them:

1. the wire: `GenerateRequest` -> `GenerateResponse`, SGLang's native `/generate`;
2. client -> replica: `Command` (one ordered stream) -> `RequestOutput` and `Reply`;
3. leader -> ranks: `StepPlan` -> `StepResult`, and the weight commands unchanged.

Arrays are numpy; `encode`/`decode` carry them as (dtype, shape, bytes). In process
the structs travel as they are, without a copy.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

IntArray = np.ndarray[Any, np.dtype[np.int32]]
FloatArray = np.ndarray[Any, np.dtype[np.float32]]

PauseMode = Literal["abort", "retract", "keep"]
FinishType = Literal["stop", "length", "abort"]


class SamplingParams(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How one request is sampled; names and defaults of SGLang's native API.

    `temperature` below 1e-6 is greedy (its logprobs are at temperature 1). `top_k` -1 is
    off. Penalties and `logit_bias` change the logits before temperature, so the returned
    logprob is that of the changed distribution; `top_k`, `top_p` and `min_p` only restrict
    which tokens may be drawn and do not renormalise the logprob (DESIGN, decision 9).
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    n: int = 1
    sampling_seed: int | None = None


class GenerateRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One native `/generate` object: exactly one of `text` and `input_ids`.

    `logprob_start_len` >= 0 asks for the logprobs of prompt tokens from that position
    (position 0 has none: nothing comes before it). `return_entropy` asks for the entropy of
    the distribution that each output token was drawn from, filters aside. `cache_salt` and
    `extra_key` keep the prefix cache of callers apart. Samples of `n` > 1 get seeds derived
    from one seed.
    """

    text: str | None = None
    input_ids: list[int] | None = None
    sampling_params: SamplingParams = SamplingParams()
    rid: str | None = None
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    return_entropy: bool = False
    stream: bool = False
    priority: int = 0
    cache_salt: str = ""
    extra_key: str = ""


class GenerateResponse(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One native `/generate` reply. `meta_info` holds the keys WIRE.md C2 lists."""

    text: str | None = None
    output_ids: list[int] = msgspec.field(default_factory=list)
    meta_info: dict[str, Any] = msgspec.field(default_factory=dict)
    prompt_token_ids: list[int] | None = None
    index: int | None = None


# --- client -> replica -----------------------------------------------------------------


class Request(Struct, frozen=True, kw_only=True, tag="request"):
    """One sequence to sample: ids in, one seed, `sampling.n` already expanded.

    rid: unique id of this sequence.
    prompt_ids: int32 [prompt_len], not empty.
    seed: counter-based random numbers are drawn from (seed, position).
    group: equal for the samples of one prompt; they are kept adjacent in the batch.
    stop_ids: tokens that end the sequence, the model's EOS ids included unless ignore_eos.
    prompt_logprob_start: first prompt position whose logprob is wanted; -1 for none.
    stream: outputs are wanted after every step, not only at the end.
    entropy: the entropy behind every output token is wanted.
    """

    rid: str
    prompt_ids: IntArray
    sampling: SamplingParams
    seed: int
    group: str = ""
    stop_ids: list[int] = msgspec.field(default_factory=list)
    priority: int = 0
    salt: str = ""
    top_logprobs: int = 0
    prompt_logprob_start: int = -1
    stream: bool = False
    entropy: bool = False


class Abort(Struct, frozen=True, kw_only=True, tag="abort"):
    """End the request `rid`, those whose id starts with `rid_prefix`, or `all`; what they
    produced comes back as their final `RequestOutput`. An id nobody has is no error."""

    rid: str = ""
    rid_prefix: str = ""
    all: bool = False
    message: str = "aborted by the client"


class Stop(Struct, frozen=True, kw_only=True, tag="stop"):
    """End one request at `num_tokens` output tokens: a stop string was seen in its text."""

    rid: str
    num_tokens: int
    matched: str


class Pause(Struct, frozen=True, kw_only=True, tag="pause"):
    """Stop stepping. abort: end everything; retract: running requests wait again, their KV
    freed; keep: nothing moves. New requests wait. Idempotent."""

    mode: PauseMode = "keep"


class Resume(Struct, frozen=True, kw_only=True, tag="resume"):
    """Undo `Pause`. Idempotent."""


class FlushCache(Struct, frozen=True, kw_only=True, tag="flush_cache"):
    """Drop every cached prefix. Refused while requests hold pages."""


class TensorSpec(Struct, frozen=True):
    """One tensor of an update: Hugging Face name, torch dtype name ('bfloat16'), shape."""

    name: str
    dtype: str
    shape: list[int]


class BeginUpdate(Struct, frozen=True, kw_only=True, tag="begin_update"):
    """Open the update to `version`; `manifest` lists every tensor that will come.

    An empty manifest announces nothing: the update must then cover the whole model.
    partial: tensors of the model that the manifest leaves out keep their values.
    """

    version: int
    manifest: list[TensorSpec] = msgspec.field(default_factory=list)
    partial: bool = False


class LoadFromDisk(Struct, frozen=True, kw_only=True, tag="load_from_disk"):
    """Feed the open update from a folder of safetensors files (or one file)."""

    path: str


class CommitUpdate(Struct, frozen=True, kw_only=True, tag="commit_update"):
    """Verify the open update and make its version the one that serves."""

    version: int


class AbortUpdate(Struct, frozen=True, kw_only=True, tag="abort_update"):
    """Drop the open update; the old version keeps serving."""

    version: int


class GetState(Struct, frozen=True, kw_only=True, tag="get_state"):
    """Ask for `ReplicaState`."""


class Shutdown(Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Finish and leave."""


WeightCommand = BeginUpdate | LoadFromDisk | CommitUpdate | AbortUpdate
Control = (
    Abort
    | Stop
    | Pause
    | Resume
    | FlushCache
    | BeginUpdate
    | LoadFromDisk
    | CommitUpdate
    | AbortUpdate
    | GetState
    | Shutdown
)
Command = Request | Control


class FinishReason(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a sequence ended: a stop token or string, its length, or an abort."""

    type: FinishType
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    error: str | None = None
    """Class name of the error for an abort the engine decided on."""


class VersionSpan(Struct, frozen=True):
    """Output tokens [start, end) were sampled by weights `version`."""

    version: int
    start: int
    end: int


class TopLogprobs(Struct, frozen=True):
    """The k likeliest tokens of n positions: int32 [n, k] and float32 [n, k]."""

    ids: IntArray
    logprobs: FloatArray


class RequestOutput(Struct, frozen=True, kw_only=True, tag="output"):
    """What a sequence produced: since the last output if it streams, else all of it.

    start: index of the first token of `token_ids` in the whole output.
    logprobs: float32 [len(token_ids)].
    entropies: float32 [len(token_ids)], nats, of softmax(logits / temperature) over the whole
        vocabulary (temperature 1 where greedy); None unless asked for.
    prompt_logprobs: float32 [prompt_len - start position], in the first output only.
    finish: None while the sequence runs.
    """

    rid: str
    start: int
    token_ids: IntArray
    logprobs: FloatArray
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_retractions: int = 0
    spans: list[VersionSpan] = msgspec.field(default_factory=list)
    top: TopLogprobs | None = None
    prompt_logprobs: FloatArray | None = None
    prompt_top: TopLogprobs | None = None
    entropies: FloatArray | None = None


class ErrorInfo(Struct, frozen=True, kw_only=True):
    """One error, structured: class name in `engine.errors`, field it names, message."""

    kind: str
    message: str
    field: str = ""


class ReplicaState(Struct, frozen=True, kw_only=True, tag="state"):
    """What a replica is and does right now. Times in seconds, memory in pages."""

    version: int
    paused: bool
    num_running: int
    num_waiting: int
    free_pages: int
    cached_pages: int
    total_pages: int
    page_size: int
    context_length: int
    vocab_size: int
    eos_ids: list[int]
    model: str
    dtype: str
    device: str
    attention: str
    max_running: int
    num_retractions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0


class UpdateReport(Struct, frozen=True, kw_only=True, tag="update_report"):
    """What one update moved: bytes placed, tensors, and seconds it took."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float


class Reply(Struct, frozen=True, kw_only=True, tag="reply"):
    """Answer to one control command."""

    error: ErrorInfo | None = None
    state: ReplicaState | None = None
    report: UpdateReport | None = None


# --- leader -> ranks -------------------------------------------------------------------


class EngineFacts(Struct, frozen=True, kw_only=True):
    """What the ranks resolved at start-up; constant for the life of the replica."""

    model: str
    num_pages: int
    page_size: int
    context_length: int
    vocab_size: int
    eos_ids: list[int]
    dtype: str
    device: str
    attention: str
    num_parameters: int = 0
    load_seconds: float = 0.0


class RowSampling(Struct, frozen=True, kw_only=True):
    """Sampling state a rank keeps for one slot. `banned_ids` cannot be drawn while fewer
    than `min_new_tokens` were."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    seed: int
    min_new_tokens: int
    banned_ids: list[int]
    top_logprobs: int
    entropy: bool = False


class NewRow(Struct, frozen=True, kw_only=True):
    """A sequence enters `slot`. token_ids: int32, every token known so far (prompt, and
    outputs already sampled if it was retracted before); `prompt_len` of them are prompt.
    prompt_logprob_start: as in `Request`; -1 once they were returned."""

    slot: int
    token_ids: IntArray
    prompt_len: int
    sampling: RowSampling
    prompt_logprob_start: int = -1


class StepPlan(Struct, frozen=True, kw_only=True, tag="step"):
    """One step, as changes to the ranks' tables. Applied in this order: `new_rows`, page
    table writes, page copies, then the forward pass over `slots`.

    page_slots, page_columns, page_ids: int32 [U]; page_table[slot, column] = page id.
    copy_src, copy_dst: int32 [C]; copy-on-write of partly filled pages.
    slots: int32 [R], rows of the batch in order; samples of a group are adjacent.
    query_lens: int32 [R], tokens of each row computed in this step.
    kv_lens: int32 [R], tokens of each row in the KV cache once the step is done; so a row
        computes its tokens [kv_len - query_len, kv_len).
    samples: bool [R], rows whose last token's logits give a new token.
    """

    step: int
    new_rows: list[NewRow]
    page_slots: IntArray
    page_columns: IntArray
    page_ids: IntArray
    copy_src: IntArray
    copy_dst: IntArray
    slots: IntArray
    query_lens: IntArray
    kv_lens: IntArray
    samples: np.ndarray[Any, np.dtype[np.bool_]]


class PromptLogprobs(Struct, frozen=True):
    """Logprobs of a row's prompt tokens [start, start + n) computed in one step.

    logprobs: float32 [n]; top: the k likeliest at each of these positions, if asked."""

    row: int
    start: int
    logprobs: FloatArray
    top: TopLogprobs | None = None


class StepResult(Struct, frozen=True, kw_only=True, tag="step_result"):
    """What one step sampled, for the S rows of the plan with `samples` set, in row order.

    token_ids: int32 [S]; logprobs: float32 [S].
    top: int32 and float32 [S, k] with k the largest `top_logprobs` among the S rows.
    entropies: float32 [S], of rows that did not ask too; None if none of the S rows asked.
    """

    step: int
    token_ids: IntArray
    logprobs: FloatArray
    top: TopLogprobs | None = None
    prompt: list[PromptLogprobs] = msgspec.field(default_factory=list)
    entropies: FloatArray | None = None


# --- bytes -----------------------------------------------------------------------------


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
    raise TypeError(f"cannot encode {type(value).__name__}")


def _decode_array(kind: type, value: Any) -> Any:
    origin = getattr(kind, "__origin__", kind)
    if origin is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape)
    raise TypeError(f"cannot decode {kind}")


def encode(message: Any) -> bytes:
    """MessagePack bytes of any struct of this module."""
    return msgspec.msgpack.encode(message, enc_hook=_encode_array)


def decode(data: bytes, kind: Any) -> Any:
    """Inverse of `encode`; `kind` is the struct or union expected. Arrays are read-only."""
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_decode_array)
