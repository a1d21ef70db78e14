"""Every message of the project, as typed msgspec structs: no torch, no pickle.

Three layers speak them, in the order a request meets them:

1. the wire: `GenerateRequest` -> `GenerateResponse`, SGLang's native `/generate`;
2. client -> replica: `Command` (one ordered stream) -> `RequestOutput` and `Reply`;
3. leader -> ranks: `StepPlan` -> `StepResult`, and the weight commands unchanged.

Arrays are numpy; `encode`/`decode` carry them as (dtype, shape, bytes). In process
the structs travel as they are, without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

IntArray = np.ndarray[Any, np.dtype[np.int32]]
FloatArray = np.ndarray[Any, np.dtype[np.float32]]

PauseMode = Literal["abort", "retract", "keep"]
KvPolicy = Literal["keep", "recompute", "fresh"]
MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]
Rendezvous = Literal["torch", "vllm"]
BroadcastLayout = Literal["tensors", "flat", "buckets", "chunks"]
StagingMode = Literal["auto", "shadow", "in_place"]
CheckAction = Literal["checksum", "snapshot", "reset_tensors", "compare"]
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
    (position 0 has none: nothing comes before it). `cache_salt` and `extra_key` keep the
    prefix cache of callers apart. Samples of `n` > 1 get seeds derived from one seed.
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
    stream: bool = False
    priority: int = 0
    cache_salt: str = ""
    extra_key: str = ""
    kv_policy: KvPolicy = "keep"


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
    kv_policy: what a weight update does to it while it runs. keep: it goes on with the KV the
        old weights computed, which its output records; recompute: its KV is computed again
        by the new weights, its tokens stay; fresh: it starts again from its prompt, so that
        one version samples all of it (a stream, which cannot take tokens back, ends).
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
    kv_policy: KvPolicy = "keep"


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


class TensorSpec(Struct, frozen=True, omit_defaults=True):
    """One tensor of an update: Hugging Face name, torch dtype name ('bfloat16'), shape.

    checksum: `engine.weights.checksum` of the full tensor, verified before the commit.
    """

    name: str
    dtype: str
    shape: list[int]
    checksum: int | None = None


class TensorPiece(Struct, frozen=True, omit_defaults=True):
    """A tensor on the wire, or elements [start, stop) of it laid out flat, where each trainer
    rank sends what it holds. stop -1 stands for the whole tensor."""

    name: str
    dtype: str
    shape: list[int]
    start: int = 0
    stop: int = -1


class BeginUpdate(Struct, frozen=True, kw_only=True, tag="begin_update"):
    """Open the update to `version`; `manifest` lists every tensor that will come.

    An empty manifest announces nothing: the update must then cover the whole model.
    partial: tensors of the model that the manifest leaves out keep their values.
    mode: shadow holds what arrives until the commit, so that a failed update changes nothing;
        in_place writes it into the live weights at once, and a failed update leaves an engine
        that refuses to generate until a whole version was published; auto takes a shadow if
        there is memory for it.
    timeout_s: an update not committed within this time is aborted.
    """

    version: int
    manifest: list[TensorSpec] = msgspec.field(default_factory=list)
    partial: bool = False
    mode: StagingMode = "auto"
    timeout_s: float = 600.0


class JoinGroup(Struct, frozen=True, kw_only=True, tag="join_group"):
    """Join a process group of the trainer: engine rank r becomes rank `rank_offset` + r.

    The trainer's rank 0 listens at `address`:`port`. torch: a `torch.distributed` group behind
    `PrefixStore(name)`, as SGLang's dialect has it. vllm: a TCPStore and a raw NCCL
    communicator, or `unique_id` (128 bytes) in place of the store. Blocks until the world is
    complete, `timeout_s` at most. Joining again by the same arguments is no error.
    """

    name: str
    address: str
    port: int
    rank_offset: int
    world_size: int
    backend: Literal["nccl", "gloo"] = "nccl"
    rendezvous: Rendezvous = "torch"
    unique_id: bytes = b""
    timeout_s: float = 300.0


class LeaveGroup(Struct, frozen=True, kw_only=True, tag="leave_group"):
    """Leave and forget the group `name`; no error when there is none."""

    name: str


class ReceiveBroadcast(Struct, frozen=True, kw_only=True, tag="receive_broadcast"):
    """Feed the open update by broadcasts of rank `source` of `group`, in list order.

    tensors: one broadcast a tensor, in its own dtype. flat: one uint8 broadcast of all, one
    behind the other. buckets: pieces packed as uint8 up to `bucket_bytes`, each aligned to 16
    bytes, one broadcast a bucket; a larger piece has a bucket of its own. chunks: vLLM's packed
    stream, where the tensor that exceeds `bucket_bytes` still belongs to the chunk.
    """

    group: str
    tensors: list[TensorPiece]
    layout: BroadcastLayout = "buckets"
    bucket_bytes: int = 256 << 20
    source: int = 0
    timeout_s: float = 300.0


class IpcBuffer(Struct, frozen=True, omit_defaults=True):
    """Memory of another process. cuda: what torch's `UntypedStorage._share_cuda_` returns, the
    device by its UUID; shm: `name` of a POSIX shared memory block. size and offset in bytes."""

    kind: Literal["cuda", "shm"]
    size: int
    name: str = ""
    device: str = ""
    handle: bytes = b""
    offset: int = 0
    ref_handle: bytes = b""
    ref_offset: int = 0
    event: bytes = b""
    event_sync: bool = False


class IpcTensor(Struct, frozen=True):
    """A contiguous tensor `offset` bytes into buffer number `buffer`."""

    name: str
    dtype: str
    shape: list[int]
    buffer: int
    offset: int


class IpcPayload(Struct, frozen=True):
    """What `ReceiveIpc` carries in its native format, as `encode` writes it."""

    buffers: list[IpcBuffer]
    tensors: list[IpcTensor]


class ReceiveIpc(Struct, frozen=True, kw_only=True, tag="receive_ipc"):
    """Feed the open update from memory of another process on the same GPU.

    payloads: one a rank (or one for all). native: an encoded `IpcPayload`; sglang, vllm:
    pickles, read by an allow-list. With `borrow`, tensors are read in place and only at the
    commit, so that the sender must leave them alone until it has the reply to that; else the
    reply comes once they are copied.
    """

    payloads: list[bytes]
    format: Literal["native", "sglang", "sglang_bucket", "vllm"] = "native"
    borrow: bool = False


class LoadFromDisk(Struct, frozen=True, kw_only=True, tag="load_from_disk"):
    """Feed the open update from a folder of safetensors files (or one file).

    A folder with `delta.json` holds changed tensors only, against the version it names.
    """

    path: str


class CommitUpdate(Struct, frozen=True, kw_only=True, tag="commit_update"):
    """Verify the open update and make its version the one that serves."""

    version: int


class AbortUpdate(Struct, frozen=True, kw_only=True, tag="abort_update"):
    """Drop the open update; the old version keeps serving."""

    version: int


class SetVersion(Struct, frozen=True, kw_only=True, tag="set_version"):
    """Call the weights that serve `version`, which may not go backwards; cached prefixes are
    dropped, since the caller says that the weights are others."""

    version: int


class CheckWeights(Struct, frozen=True, kw_only=True, tag="check_weights"):
    """Compare weights across time or machines. checksum: of every parameter as it is stored;
    snapshot: keep a copy on the host; reset_tensors: overwrite the weights with noise, so that
    an update that misses one shows; compare: name the tensors that differ from the snapshot."""

    action: CheckAction = "checksum"


class GetWeight(Struct, frozen=True, kw_only=True, tag="get_weight"):
    """The first `count` elements of a tensor by Hugging Face name, of this engine's shard."""

    name: str
    count: int = 100


class ReleaseMemory(Struct, frozen=True, kw_only=True, tag="release_memory"):
    """Give GPU memory back: weights, KV pool, CUDA graphs; empty tags mean all. Refused while
    requests hold KV pages. `kv_cache` drops every cached prefix. Idempotent."""

    tags: list[MemoryTag] = msgspec.field(default_factory=list)


class ResumeMemory(Struct, frozen=True, kw_only=True, tag="resume_memory"):
    """Take memory back, at the addresses it had; empty tags mean all. Weights come back with
    their values where a CPU backup is kept, else a whole update must follow. Idempotent."""

    tags: list[MemoryTag] = msgspec.field(default_factory=list)


class GetState(Struct, frozen=True, kw_only=True, tag="get_state"):
    """Ask for `ReplicaState`."""


class Shutdown(Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Finish and leave."""


WeightCommand = (
    BeginUpdate
    | JoinGroup
    | LeaveGroup
    | ReceiveBroadcast
    | ReceiveIpc
    | LoadFromDisk
    | CommitUpdate
    | AbortUpdate
)
"""What a rank does for an update."""
EngineCommand = WeightCommand | CheckWeights | GetWeight | ReleaseMemory | ResumeMemory
"""What a rank does beside stepping."""
Control = (
    Abort
    | Stop
    | Pause
    | Resume
    | FlushCache
    | BeginUpdate
    | JoinGroup
    | LeaveGroup
    | ReceiveBroadcast
    | ReceiveIpc
    | LoadFromDisk
    | CommitUpdate
    | AbortUpdate
    | SetVersion
    | CheckWeights
    | GetWeight
    | ReleaseMemory
    | ResumeMemory
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
    prompt_logprobs: float32 [prompt_len - start position], in the first output only.
    finish: None while the sequence runs.
    kv_spans: which version computed the KV of tokens [start, end), prompt included, in the
        final output; more than one span says that stale KV was attended to.
    """

    rid: str
    start: int
    token_ids: IntArray
    logprobs: FloatArray
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_retractions: int = 0
    num_restarts: int = 0
    spans: list[VersionSpan] = msgspec.field(default_factory=list)
    kv_spans: list[VersionSpan] = msgspec.field(default_factory=list)
    top: TopLogprobs | None = None
    prompt_logprobs: FloatArray | None = None
    prompt_top: TopLogprobs | None = None


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
    tp_size: int = 1
    pause_mode: PauseMode | None = None
    released: list[MemoryTag] = msgspec.field(default_factory=list)
    open_update: int | None = None
    """Version of the update between its begin and its commit."""
    refusal: str = ""
    """Why no step may run, if so: weights are released, or an in-place update failed."""
    groups: list[str] = msgspec.field(default_factory=list)


class UpdateReport(Struct, frozen=True, kw_only=True, tag="update_report"):
    """What one update moved: bytes placed, tensors, and seconds it took."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float


class MemoryReport(Struct, frozen=True, kw_only=True):
    """What a release or resume moved on one rank: bytes given back or taken (by tag), bytes of
    the device still in use by this process, seconds."""

    tags: dict[str, int]
    used_bytes: int
    seconds: float


class WeightsReport(Struct, frozen=True, kw_only=True):
    """Answer of one rank to `CheckWeights` or `GetWeight`.

    checksums: by parameter name. differing: names that `compare` found. values: elements.
    """

    rank: int = 0
    checksums: dict[str, int] = msgspec.field(default_factory=dict)
    differing: list[str] = msgspec.field(default_factory=list)
    values: list[float] = msgspec.field(default_factory=list)


class Reply(Struct, frozen=True, kw_only=True, tag="reply"):
    """Answer to one control command; the lists have one entry a rank.

    in_place: the update that was begun writes into the live weights, so no step may run until
    it is committed.
    """

    error: ErrorInfo | None = None
    state: ReplicaState | None = None
    report: UpdateReport | None = None
    memory: list[MemoryReport] = msgspec.field(default_factory=list)
    weights: list[WeightsReport] = msgspec.field(default_factory=list)
    in_place: bool = False


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
    tp_size: int = 1


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
    """

    step: int
    token_ids: IntArray
    logprobs: FloatArray
    top: TopLogprobs | None = None
    prompt: list[PromptLogprobs] = msgspec.field(default_factory=list)


# --- buckets ---------------------------------------------------------------------------

BUCKET_ALIGNMENT = 16
"""Bytes that the pieces of a bucket are aligned to."""

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}
"""Bytes of an element by torch dtype name."""


class Placement(Struct, frozen=True):
    """A piece at [offset, offset + num_bytes) of its bucket."""

    piece: TensorPiece
    offset: int
    num_bytes: int


class Bucket(Struct, frozen=True):
    """What one broadcast carries: `num_bytes` of uint8, the padding between pieces included."""

    placements: list[Placement]
    num_bytes: int


def piece_bytes(piece: TensorPiece) -> int:
    """Bytes of a piece. Raises KeyError on a dtype that is not in `ITEM_BYTES`."""
    stop = math.prod(piece.shape) if piece.stop < 0 else piece.stop
    return (stop - piece.start) * ITEM_BYTES[piece.dtype]


def plan_buckets(pieces: Sequence[TensorPiece], bucket_bytes: int) -> list[Bucket]:
    """The layout "buckets" of `ReceiveBroadcast`: sender and receiver both compute it.

    Pieces keep their order; a bucket ends before the piece that would exceed `bucket_bytes`.
    """
    buckets: list[Bucket] = []
    placements: list[Placement] = []
    end = 0
    for piece in pieces:
        size = piece_bytes(piece)
        offset = -(-end // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT
        if placements and offset + size > bucket_bytes:
            buckets.append(Bucket(placements, end))
            placements, offset = [], 0
        placements.append(Placement(piece, offset, size))
        end = offset + size
    if placements:
        buckets.append(Bucket(placements, end))
    return buckets


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
