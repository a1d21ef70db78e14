"""Commands beside requests and updates, the unions of all commands, and their replies."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Struct

from engine.protocol.requests import Abort, FlushCache, Pause, Request, Resume, Stop
from engine.protocol.rollouts import RolloutCommand, RolloutState
from engine.protocol.routes import ExpertFacts
from engine.protocol.sessions import SessionCommand, SessionState
from engine.protocol.types import (
    CheckAction,
    Count,
    MemoryTag,
    MemoryTags,
    Name,
    NumSteps,
    NumValues,
    Path,
    PauseMode,
    ProfileActivity,
    Size,
    Version,
)
from engine.protocol.updates import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    LeaveGroup,
    LoadFromDisk,
    PlanExcerpts,
    PrepareUpdate,
    RankExcerpts,
    ReceiveBroadcast,
    ReceiveExcerpts,
    ReceiveIpc,
    UpdateReport,
    WeightCommand,
)


class SetVersion(Struct, frozen=True, kw_only=True, tag="set_version"):
    """Call the weights that serve `version`, which may not go backwards; cached prefixes are
    dropped, since the caller says that the weights are others."""

    version: Version


class CheckWeights(Struct, frozen=True, kw_only=True, tag="check_weights"):
    """Compare weights across time or machines. checksum: of every tensor as it is stored; layout:
    what of each is stored, and how, from which a trainer computes those; snapshot: keep a copy on
    the host; reset_tensors: overwrite the weights with noise, so that an update that misses one
    shows, and refuse to generate until a whole update was committed (UpdateOrder while one is
    open); compare: name the tensors that differ from the snapshot."""

    action: CheckAction = "checksum"


class GetWeight(Struct, frozen=True, kw_only=True, tag="get_weight"):
    """The first `count` elements of a tensor by Hugging Face name, of this engine's shard."""

    name: Name
    count: NumValues = 100


class ReleaseMemory(Struct, frozen=True, kw_only=True, tag="release_memory"):
    """Give GPU memory back: weights, KV pool, CUDA graphs; empty tags mean all. Refused while
    requests hold KV pages. `kv_cache` drops every cached prefix. Idempotent.

    pause: stop stepping by this mode first, as `Pause` does. What refuses the release is looked at
        before: then nothing is paused, and no request ended or moved.
    """

    tags: MemoryTags = msgspec.field(default_factory=list)
    pause: PauseMode | None = None


class ResumeMemory(Struct, frozen=True, kw_only=True, tag="resume_memory"):
    """Take memory back, at the addresses it had; empty tags mean all. Weights come back with
    their values where a CPU backup is kept, else a whole update must follow. Idempotent."""

    tags: MemoryTags = msgspec.field(default_factory=list)


class StartProfile(Struct, frozen=True, kw_only=True, tag="start_profile"):
    """Trace what every rank does, by torch's profiler, until StopProfile or for `num_steps`
    steps: from now on, or from the step with number `start_step`. One file a rank in `folder`,
    which is made; `name` begins the files' names. activities: empty for all that the device has.
    Raises ProfileOrder while another is in progress."""

    folder: Path
    name: Name = ""
    activities: Annotated[list[ProfileActivity], msgspec.Meta(max_length=4)] = msgspec.field(
        default_factory=list
    )
    start_step: Size | None = None
    num_steps: NumSteps | None = None
    with_stack: bool = False
    record_shapes: bool = False


class StopProfile(Struct, frozen=True, kw_only=True, tag="stop_profile"):
    """End the profile and write its traces; `Reply.traces` names them. Raises ProfileOrder
    without one."""


class GetState(Struct, frozen=True, kw_only=True, tag="get_state"):
    """Ask for `ReplicaState`."""


class Shutdown(Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Finish and leave."""


ProfileCommand = StartProfile | StopProfile

EngineCommand = (
    WeightCommand | CheckWeights | GetWeight | ReleaseMemory | ResumeMemory | ProfileCommand
)
"""What a rank does beside stepping."""

ControlCommand = (
    Abort
    | Stop
    | Pause
    | Resume
    | FlushCache
    | BeginUpdate
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
    | SetVersion
    | CheckWeights
    | GetWeight
    | ReleaseMemory
    | ResumeMemory
    | StartProfile
    | StopProfile
    | GetState
    | Shutdown
)
"""Commands that are JSON, and so are their replies."""

Command = ControlCommand | SessionCommand | RolloutCommand


class Call(Struct, frozen=True, kw_only=True, tag="call"):
    """A control command on its way to a leader. `id` is the caller's, and the reply carries it:
    replies may come in another order than their commands."""

    id: Size
    command: Command


class CancelTransfers(Struct, frozen=True, kw_only=True, tag="cancel_transfers"):
    """Leader to rank: end transfers in progress early, because of `reason`; they are answered
    with it. Nothing is answered to this. group: only those that use it, and what forms it."""

    reason: str
    group: str = ""


class FrontGone(Struct, frozen=True, kw_only=True, tag="front_gone"):
    """Owner to leader: the front process `name` is gone, and nobody reads what its requests come
    to. They are aborted; nothing is answered to this."""

    name: str


LeaderMessage = Request | Call | FrontGone
"""What a leader receives, in the order it was sent."""


class ErrorInfo(Struct, frozen=True, kw_only=True):
    """One error, structured: class name in `engine.errors`, field it names, message."""

    kind: str
    message: str
    field: str = ""


class CopyLoad(Struct, frozen=True, kw_only=True):
    """What one copy of the model does, in the words of `ReplicaState`."""

    num_running: Count
    num_waiting: Count
    free_pages: Count
    cached_pages: Count


class ReplicaState(Struct, frozen=True, kw_only=True, tag="state"):
    """What a replica is and does right now. Times in seconds, memory in pages."""

    version: Version
    paused: bool
    num_running: Count
    num_waiting: Count
    free_pages: Count
    cached_pages: Count
    total_pages: Count
    page_size: Count
    context_length: Count
    vocab_size: Count
    eos_ids: list[int]
    model: str
    dtype: str
    device: str
    attention: str
    max_running: Count
    architecture: str = ""
    model_type: str = ""
    """As in config.json: the class's name, and what transformers calls the kind of model."""
    num_labels: Count = 0
    """Scores of a sequence that a classifier gives; 0 of a model that generates."""
    labels: list[str] = msgspec.field(default_factory=list)
    """Their names."""
    hidden_size: Count = 0
    """Numbers of an embedding."""
    collectives: str = ""
    """How the ranks reach each other."""
    experts: ExpertFacts | None = None
    """None of a dense model."""
    keeps_routes: bool = False
    """Whether requests may set `return_routed_experts`."""
    drafter: str = ""
    """`SpeculativeConfig.drafter`."""
    draft_tokens: Count = 0
    """Most tokens that are drafted at once for a sequence; 0 where nothing is."""
    forces_acceptance: bool = False
    """Whether requests may set `forced_acceptance`."""
    max_waiting: Count = 65536
    max_samples: Count = 1024
    held_pages: Count = 0
    """Pages that idle sessions hold, shared ones for each; others that need them get them."""
    num_sessions: Count = 0
    num_rollouts: Count = 0
    num_retractions: Size = 0
    num_prompt_tokens: Size = 0
    num_cached_tokens: Size = 0
    num_output_tokens: Size = 0
    num_steps: Size = 0
    idle_s: float = 0.0
    """Time in which there was nothing to do; of a replica in a process of its own."""
    num_verify_steps: Size = 0
    num_verified_rows: Size = 0
    num_drafted_tokens: Size = 0
    num_accepted_tokens: Size = 0
    draft_len: Count = 0
    """As in `SchedulerStats`; 0 where nothing is drafted."""
    tp_size: Count = 1
    """Ranks that share a copy of the model."""
    dp_size: Count = 1
    """Copies of the model; counts and limits are of all together."""
    copies: list[CopyLoad] = msgspec.field(default_factory=list)
    """Of each copy, where there are several."""
    pause_mode: PauseMode | None = None
    released: list[MemoryTag] = msgspec.field(default_factory=list)
    open_update: Version | None = None
    """Version of the update between its begin and its commit."""
    refusal: str = ""
    """Why no step may run, if so: weights are released, or an in-place update failed."""
    releases: bool = False
    """Whether memory can be given back: the engine was built with `memory.saver`."""
    groups: list[str] = msgspec.field(default_factory=list)
    receiving: list[str] = msgspec.field(default_factory=list)
    """Weight commands in progress beside steps, and those that wait for them, in order."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the replica: as many join a trainer's group."""
        return self.tp_size * self.dp_size


class MemoryReport(Struct, frozen=True, kw_only=True):
    """What a release or resume moved on one rank: bytes given back or taken (by tag), bytes of
    the device still in use by this process, seconds."""

    tags: dict[str, Size]
    used_bytes: Size
    seconds: float


class StoredTensor(Struct, frozen=True, kw_only=True):
    """What one rank stores of a full tensor.

    codec, dtype: `kernels.quant.codec_named` takes both. pieces: elements of the full tensor, one
    [start, stop, step] for every dim, in the order in which the rank's checksum reads them.
    """

    codec: str
    dtype: str
    pieces: list[list[tuple[int, int, int]]]


class WeightsReport(Struct, frozen=True, kw_only=True):
    """Answer of one rank to `CheckWeights` or `GetWeight`.

    checksums: by the name of each full tensor, of all that is stored for it: the elements of its
    storages one behind the other. layout: by the same names. differing: names that `compare` found.
    values: elements, dequantised.
    """

    rank: Count = 0
    checksums: dict[str, int] = msgspec.field(default_factory=dict)
    layout: dict[str, StoredTensor] = msgspec.field(default_factory=dict)
    differing: list[str] = msgspec.field(default_factory=list)
    values: list[float] = msgspec.field(default_factory=list)


class Reply(Struct, frozen=True, kw_only=True, tag="reply"):
    """Answer to one control command; the lists have one entry a rank.

    id: of the `Call` that it answers; 0 for what nobody called.
    in_place: the update that was begun writes into the live weights, so no step may run until
    it is committed. undo: what it writes over comes back if it is aborted.
    excerpts: of a `PlanExcerpts`. traces: files of a profile.
    refusal: after a commit or a `CheckWeights`: why no step may run, or "".
    session: of a command of `SessionCommand`, but that of one that was closed.
    rollout: of a command of `RolloutCommand`.
    """

    id: Size = 0
    error: ErrorInfo | None = None
    state: ReplicaState | None = None
    report: UpdateReport | None = None
    memory: list[MemoryReport] = msgspec.field(default_factory=list)
    weights: list[WeightsReport] = msgspec.field(default_factory=list)
    excerpts: list[RankExcerpts] = msgspec.field(default_factory=list)
    traces: list[str] = msgspec.field(default_factory=list)
    in_place: bool = False
    undo: bool = False
    refusal: str = ""
    session: SessionState | None = None
    rollout: RolloutState | None = None
