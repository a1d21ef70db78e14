"""Commands of a weight update, from begin to commit, and what they carry."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from engine.protocol.types import (
    MAX_TENSORS,
    BroadcastLayout,
    Checksum,
    Count,
    GroupSize,
    Handle,
    Name,
    Owner,
    Path,
    Payloads,
    Port,
    Position64,
    PositiveSize,
    Rank,
    Rendezvous,
    Seconds,
    Shape,
    Size,
    StagingMode,
    Version,
)


class TensorSpec(Struct, frozen=True, omit_defaults=True):
    """One tensor of an update: Hugging Face name, torch dtype name ('bfloat16'), shape.

    checksum: `engine.weights.checksum` of the full tensor, verified before the commit.
    """

    name: Name
    dtype: Name
    shape: Shape
    checksum: Checksum | None = None


DELTA_FILE = "delta.json"


class FolderDelta(Struct, frozen=True):
    """What `delta.json` says of its folder: the tensors that `version` changed since
    `base_version`. The trainer writes it, and the engine takes the folder on no other version."""

    base_version: int
    version: int
    tensors: list[TensorSpec]


class TensorPiece(Struct, frozen=True, omit_defaults=True):
    """A tensor on the wire, or elements [start, stop) of it laid out flat, where each trainer
    rank sends what it holds. stop -1 stands for the whole tensor."""

    name: Name
    dtype: Name
    shape: Shape
    start: Size = 0
    stop: Position64 = -1


Pieces = Annotated[list[TensorPiece], Meta(max_length=MAX_TENSORS)]


class BeginUpdate(Struct, frozen=True, kw_only=True, tag="begin_update"):
    """Open the update to `version`; `manifest` lists every tensor that will come.

    An empty manifest announces nothing: the update must then cover the whole model.
    partial: tensors of the model that the manifest leaves out keep their values.
    mode: shadow holds what arrives until the commit, so that a failed update changes nothing;
        undo writes it into the live weights at once and keeps what was there, which a failed
        update puts back; in_place keeps nothing, and a failed update leaves an engine that
        refuses to generate until a whole version was published. Under both of these requests
        wait until the commit. auto takes the first of shadow, undo and in_place that there is
        memory for: a rank's undo copy has its part of the tensors, a shadow the whole ones.
    timeout_s: an update not committed within this time is aborted; 1800 s at most.
    owner: drawn by whoever begins. Only commands with the same `owner` go on with the update,
        and only they begin in its place once tensors came, the same version or another.
    """

    version: Version
    manifest: Annotated[list[TensorSpec], Meta(max_length=MAX_TENSORS)] = msgspec.field(
        default_factory=list
    )
    partial: bool = False
    mode: StagingMode = "auto"
    timeout_s: Seconds = 600.0
    owner: Owner = ""


class JoinGroup(Struct, frozen=True, kw_only=True, tag="join_group"):
    """Join a process group of the trainer: engine rank r becomes rank `rank_offset` + r.

    The trainer's rank 0 listens at `address`:`port`. torch: a `torch.distributed` group behind
    `PrefixStore(name)`, as SGLang's dialect has it. vllm: a TCPStore and a raw NCCL
    communicator, or `unique_id` (128 bytes) in place of the store. Blocks until the world is
    complete, `timeout_s` at most. Joining again by the same arguments is no error.

    senders: ranks 0 to `senders` - 1 are a trainer's, and each sends to every engine rank by
    itself (`ReceiveExcerpts`); 0 stands for one trainer rank that broadcasts.
    """

    name: Name
    address: Name
    port: Port
    rank_offset: Rank
    world_size: GroupSize
    backend: Literal["nccl", "gloo"] = "nccl"
    rendezvous: Rendezvous = "torch"
    unique_id: Handle = b""
    senders: Rank = 0
    timeout_s: Seconds = 300.0


class LeaveGroup(Struct, frozen=True, kw_only=True, tag="leave_group"):
    """Leave and forget the group `name`; no error when there is none."""

    name: Name


class ReceiveBroadcast(Struct, frozen=True, kw_only=True, tag="receive_broadcast"):
    """Feed the open update by broadcasts of rank `source` of `group`, in list order.

    tensors: one broadcast a tensor, in its own dtype. flat: one uint8 broadcast of all, one
    behind the other. buckets: pieces packed as uint8 up to `bucket_bytes`, each aligned to 16
    bytes, one broadcast a bucket; a larger piece has a bucket of its own. chunks: vLLM's packed
    stream, where the tensor that exceeds `bucket_bytes` still belongs to the chunk.
    """

    group: Name
    tensors: Pieces
    layout: BroadcastLayout = "buckets"
    bucket_bytes: PositiveSize = 256 << 20
    source: Rank = 0
    timeout_s: Seconds = 300.0
    owner: Owner = ""


DIRECT_BYTES = 1 << 20
"""A part of this size is a message of its own, which can be sent and received where it is."""

Shares = Annotated[list[tuple[Count, Size, Size]], Meta(max_length=MAX_TENSORS)]
"""Flat elements [number of the tensor, start, stop) that one trainer rank sends."""


class Block(Struct, frozen=True, array_like=True):
    """Elements that a rank takes of a tensor: from flat element `start` of it on lies a tensor of
    `shape`, and the rank takes those of it that are within `ranges`, a [first, last) for each dim.
    """

    start: Size
    shape: Shape
    ranges: list[tuple[Size, Size]]


Blocks = list[Block]
"""Of one tensor: none where the rank needs nothing of it, several where it is several units."""


class RankExcerpts(Struct, frozen=True, kw_only=True):
    """What one engine rank takes of each tensor of a `PlanExcerpts`, in its order."""

    rank: Count = 0
    tensors: list[Blocks]


class PlanExcerpts(Struct, frozen=True, kw_only=True, tag="plan_excerpts"):
    """Prepare updates by `ReceiveExcerpts` over `group`, formed with `JoinGroup.senders`.

    tensors: whole ones, in the order in which they will come. shares: of each trainer rank, the
        flat elements [number of the tensor, start, stop) that it sends; together they are every
        element once. bucket_bytes: most bytes that one trainer rank sends at a time, unless one
        tensor is larger. direct_bytes: a part of this size is a message of its own. whole: every
        rank takes all of every tensor, as it must where checksums are announced.

    `Reply.excerpts` says what each rank takes, from which the trainer ranks compute the same plan.
    It holds until the group is left.
    """

    group: Name
    tensors: Pieces
    shares: Annotated[list[Shares], Meta(max_length=1 << 16)]
    bucket_bytes: PositiveSize = 256 << 20
    direct_bytes: PositiveSize = DIRECT_BYTES
    whole: bool = False
    timeout_s: Seconds = 300.0


class ReceiveExcerpts(Struct, frozen=True, kw_only=True, tag="receive_excerpts"):
    """Feed the open update from every trainer rank of `group` at once, by the last
    `PlanExcerpts` of the group: each rank receives what it said it takes, and nothing else."""

    group: Name
    timeout_s: Seconds = 300.0
    owner: Owner = ""


class IpcBuffer(Struct, frozen=True, omit_defaults=True):
    """Memory of another process. cuda: what torch's `UntypedStorage._share_cuda_` returns, the
    device by its UUID; shm: `name` of a POSIX shared memory block. size and offset in bytes."""

    kind: Literal["cuda", "shm"]
    size: Size
    name: Name = ""
    device: Name = ""
    handle: Handle = b""
    offset: Size = 0
    ref_handle: Handle = b""
    ref_offset: Size = 0
    event: Handle = b""
    event_sync: bool = False


class IpcTensor(Struct, frozen=True):
    """A contiguous tensor `offset` bytes into buffer number `buffer`."""

    name: Name
    dtype: Name
    shape: Shape
    buffer: Count
    offset: Size


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

    payloads: Payloads
    format: Literal["native", "sglang", "sglang_bucket", "vllm"] = "native"
    borrow: bool = False
    owner: Owner = ""


class LoadFromDisk(Struct, frozen=True, kw_only=True, tag="load_from_disk"):
    """Feed the open update from a folder of safetensors files (or one file).

    Everything is read before the reply, so the files may go or change after it. A folder with
    `delta.json` holds changed tensors only, against the version it names. Any other has to hold
    the whole model, unless `partial`: some tensors of it, the first of several folders, say.
    """

    path: Path
    partial: bool = False
    owner: Owner = ""


class PrepareUpdate(Struct, frozen=True, kw_only=True, tag="prepare_update"):
    """Verify the open update as its commit would, and place nothing.

    The first of two phases for a trainer with several engines: once every engine has answered,
    no commit can be refused for what came. The update's time starts anew. Idempotent; what comes
    afterwards has to be verified again, and a commit without it verifies by itself.
    """

    version: Version
    owner: Owner = ""


class CommitUpdate(Struct, frozen=True, kw_only=True, tag="commit_update"):
    """Verify the open update and make its version the one that serves."""

    version: Version
    owner: Owner = ""


class AbortUpdate(Struct, frozen=True, kw_only=True, tag="abort_update"):
    """Drop the open update. The old version keeps serving, unless the update was written in place
    and something came: then nothing does until a whole version was published."""

    version: Version
    owner: Owner = ""


WeightCommand = (
    BeginUpdate
    | JoinGroup
    | LeaveGroup
    | ReceiveBroadcast
    | PlanExcerpts
    | ReceiveExcerpts
    | ReceiveIpc
    | LoadFromDisk
    | PrepareUpdate
    | CommitUpdate
    | AbortUpdate
)
"""What a rank does for an update."""


GroupCommand = JoinGroup | LeaveGroup
"""What forms and drops groups; it touches no update."""

GroupTransfer = ReceiveBroadcast | PlanExcerpts | ReceiveExcerpts
"""What uses a group with the trainer."""

TransferCommand = GroupTransfer | ReceiveIpc | LoadFromDisk
"""What feeds the open update, or prepares to."""

BesideSteps = GroupCommand | TransferCommand
"""What waits for somebody else: ranks run it on threads of their own, beside steps."""


class UpdateReport(Struct, frozen=True, kw_only=True, tag="update_report"):
    """What one update moved: bytes placed, tensors, and seconds it took."""

    version: Version
    num_tensors: Size
    num_bytes: Size
    seconds: float
