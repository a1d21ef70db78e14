"""Configuration of one engine replica: frozen, resolved once, never mutated.

Torch-free: `rollout` reads it too. `tyro` builds the command lines of `serve` and `offline` from
these classes: a field is an option of its own name, or of the name that `arg` gives it, and its
documentation is the option's help. `Suppress` keeps a field off the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Suppress, arg
from tyro.constructors import PrimitiveConstructorSpec

LoadFormat = Literal["auto", "safetensors", "gguf", "random"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
AttentionBackendName = Literal["auto", "torch_native", "triton", "flashinfer", "split"]
KernelBackend = Literal["torch", "triton"]
KVDType = Literal["auto", "fp8_e4m3"]
KVScaleSource = Literal["token", "checkpoint"]
SpeculativeMethod = Literal["off", "auto", "ngram", "eagle3", "draft"]
SpeculativePace = Literal["time", "counts"]
Numerics = Literal["fast", "invariant"]
Quantization = Literal["none", "fp8", "fp8-channel", "int8", "int4"]
QueuePolicy = Literal["fcfs", "longest_prefix"]

DEFAULT_CONTEXT_LIMIT = 32768
"""Most tokens of a sequence where no `context_length` is given, whatever the model could take."""

MAX_DRAFT_TOKENS = 7
"""Most tokens that are drafted at once for a sequence."""
DRAFT_LADDER = (1, 3, MAX_DRAFT_TOKENS)
"""Drafts of a row that steps are built for; a row that has fewer leaves rows of the step unused."""
MAX_VERIFY_ROWS = 512
"""Most rows of a step that verifies drafts, each draft one."""
ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896)
"""Rows that graphs are captured for, a step being padded to the next of them; above, 256 apart."""

GIB = 1 << 30
MIB = 1 << 20


def bytes_option(unit: int, kind: type[int] | type[float]) -> PrimitiveConstructorSpec[int | None]:
    """How a command line takes a field of bytes, whose type may have None: as a number of `unit`.

    kind: of that number. What is no number of bytes, such as nan, stays what it is, for the check
    of ranges to name.
    """

    def read(words: list[str]) -> int | None:
        if words == ["None"]:
            return None
        value = kind(words[0]) * unit
        return int(value) if math.isfinite(value) else value  # type: ignore[return-value]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, int),
        str_from_instance=lambda value: [str(None if value is None else kind(value / unit))],
    )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV pool and the prefix cache."""

    page_size: int = 16
    """Tokens a KV page holds."""
    num_pages: Suppress[int | None] = None
    """KV pages to allocate; None sizes the pool from `memory_bytes` or `memory_fraction`."""
    memory_bytes: Annotated[int | None, arg(name="kv-memory"), bytes_option(GIB, float)] = None
    """GiB for the KV cache; by default a share of the free memory."""
    memory_fraction: Annotated[float, arg(name="mem-fraction")] = 0.85
    """Share of free GPU memory for the KV cache, where --kv-memory is not given; on CPU a quarter
    of this share."""
    prefix_cache: bool = True
    """Reuse the KV of shared prefixes."""
    kv_dtype: KVDType = "auto"
    """What keys and values are kept as: 'auto' as they are computed, 'fp8_e4m3' in half the bytes
    of bfloat16, with a scale for each token and head; docs/numerics.md has what that costs."""
    kv_scales: KVScaleSource = "token"
    """Where the scales of fp8 KV come from: 'token' is each token's own. 'checkpoint' is not
    built."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What the scheduler may put into one step and how it orders the waiting queue."""

    max_running: int = 256
    """Most sequences running at once, on each copy of the model."""
    max_step_tokens: Suppress[int] = 8192
    """Most tokens computed in one step, prefill and decode together."""
    max_chunk_tokens: Suppress[int] = 2048
    """Longest piece of one prompt computed in one step."""
    max_waiting: int = 65536
    """Most requests in the waiting queue; one more gets 503."""
    max_samples: int = 1024
    """Most samples (n) of one request."""
    policy: Suppress[QueuePolicy] = "longest_prefix"
    """Order of the waiting queue: arrival, or longest cached prefix first."""
    starvation_steps: Suppress[int] = 64
    """Plans that may pass a waiting request over before it goes first."""
    overlap: Suppress[bool | None] = None
    """Plan a step while the one before it runs; None does so on a GPU. Same outputs."""
    mask_timeout_s: Suppress[float] = 30.0
    """Longest that a step waits for the masks of its rows, at most `deadlines.MASK_S`; a request
    whose mask is later ends with MaskTimeout."""
    check_integrity: Suppress[bool] = False
    """Check slots, pages and the whole prefix tree whenever the engine has become idle."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks a replica has and how long they wait for each other."""

    tp_size: Annotated[int, arg(name="tp")] = 1
    """Tensor-parallel ranks, one GPU each."""
    dp_size: Annotated[int, arg(name="dp")] = 1
    """Copies of the model, each with --tp ranks and a KV cache of its own; requests are divided
    among them."""
    ep: bool = False
    """Divide a model's experts among the --tp ranks, each holding some of them whole; without it
    every rank holds a slice of each."""
    base_gpu: int = 0
    """First GPU of the replica, among those visible."""
    timeout_s: Suppress[float] = 60.0
    """Deadline of a collective; a rank that misses it ends the replica with EngineDead."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the replica, one GPU each."""
        return self.dp_size * self.tp_size

    def rank_name(self, rank: int) -> str:
        """How errors name a rank: "rank 3", or "rank 3 (dp 1, tp 1)" where there are copies."""
        dp_rank, tp_rank = divmod(rank, self.tp_size)
        place = f" (dp {dp_rank}, tp {tp_rank})" if self.dp_size > 1 else ""
        return f"rank {rank}{place}"


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Giving GPU memory back between rollouts, and sharing it with a trainer."""

    saver: Annotated[bool, arg(name="enable-memory-saver")] = False
    """Make release and resume of GPU memory work; on a GPU this takes torch-memory-saver."""
    cpu_backup: Annotated[bool, arg(name="enable-weights-cpu-backup")] = False
    """Keep released weights in host memory, and bring them back on resume."""
    trainer_bytes: Annotated[int, arg(name="trainer-memory"), bytes_option(GIB, float)] = 0
    """GiB per GPU that a trainer beside the engine needs while the engine is awake."""
    trainer_training_bytes: Annotated[
        int, arg(name="trainer-training-memory"), bytes_option(GIB, float)
    ] = 0
    """GiB per GPU that it needs while the engine sleeps; what does not fit is refused at start."""
    trainer_publishing_bytes: Suppress[int] = 0
    """GPU memory per rank that the trainer needs while it publishes, its buckets included."""
    reserve_shadow: bool = False
    """Leave room for a second copy of the weights, so that updates never write in place."""


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Drafted tokens that are verified together. What is sampled is the same with and without."""

    method: Annotated[SpeculativeMethod, arg(name="speculative")] = "off"
    """Draft tokens ahead: 'ngram' copies them from the sequence itself, from samples of the same
    prompt and from earlier ones; 'auto' does so whenever that is measured to be faster. 'eagle3'
    and 'draft' are not built."""
    draft_tokens: int = 3
    """Most tokens drafted at once for a sequence, 1 to 7."""
    allow_forced_acceptance: bool = False
    """Serve requests that set forced_acceptance, a tool of benchmarks whose tokens mean nothing."""
    pace: Suppress[SpeculativePace] = "time"
    """How 'auto' judges: by measured times, or by counts alone so that a seed repeats a run."""
    history_tokens: Suppress[int] = 1 << 22
    """Tokens of finished sequences that are kept to draft from."""
    num_segments: Suppress[int] = 4096
    """Finished sequences that are kept to draft from."""
    num_sources: Suppress[int] = 16
    """Other sequences that are looked through for one row."""

    @property
    def enabled(self) -> bool:
        """Whether anything may be drafted."""
        return self.method != "off"

    @property
    def drafter(self) -> str:
        """What drafts; "" where nothing does."""
        return "ngram" if self.enabled else ""

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of `ReplicaState`: what its callers may ask for."""
        return {
            "drafter": self.drafter,
            "draft_tokens": self.most,
            "forces_acceptance": self.allow_forced_acceptance,
        }

    @property
    def most(self) -> int:
        """Most tokens drafted at once for a sequence; 0 where nothing is drafted."""
        return self.draft_tokens if self.enabled else 0


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """What is kept between requests, in the memory of the engine's leader."""

    max_sessions: int = 4096
    """Most sessions open at once; one more gets 429."""
    session_timeout_s: float = 600.0
    """Seconds without a turn after which a session is closed; it may ask for fewer."""
    session_tokens: Suppress[int] = 1 << 26
    """Most tokens of all open sessions together, 4 bytes each."""
    max_rollouts: int = 4096
    """Most captured rollouts open at once; one more gets 429."""
    rollout_timeout_s: float = 3600.0
    """Seconds without a call after which a captured rollout is forgotten; it may ask for fewer."""
    rollout_bytes: Suppress[int] = 1 << 30
    """Most memory of all captured rollouts together."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything a replica is built from."""

    model: str
    """Hugging Face folder, GGUF file, or a config.json (with --load-format random)."""
    load_format: LoadFormat = "auto"
    """Where the weights come from; 'random' needs only a config.json."""
    device: Device = "auto"
    """'auto' takes a GPU when there is one."""
    dtype: DType = "auto"
    """Weights, activations and KV; 'auto' is bfloat16 where the device computes it fast, else
    float32. float16 is finer than bfloat16 and ends at 65504: docs/numerics.md compares them."""
    context_length: int | None = None
    """Most tokens of a sequence; by default the model's own, at most 32768."""
    quantization: Quantization = "none"
    """What weights of linear layers are stored as, whatever dtype they come in: 'int8' halves their
    bytes (docs/quantization.md). 'fp8', 'fp8-channel' and 'int4' are not built."""
    attention: AttentionBackendName = "auto"
    """Attention back end: 'triton' and 'flashinfer' need a GPU, 'split' takes prefill from
    flashinfer and decode from triton; 'auto' asks engine.attention.select."""
    numerics: Numerics = "fast"
    """'invariant', the same bits whatever else is in a step, is not built."""
    cuda_graphs: bool = True
    """On a GPU, replay decode steps as CUDA graphs."""
    capture_at_start: bool = False
    """Capture the graphs before the first request, not when a step first needs one."""
    seed: int | None = None
    """Seed of requests that bring none, and of random weights; by default the first is drawn and
    logged, and random weights have their fixed seed 0."""
    return_routed_experts: Annotated[bool, arg(name="enable-return-routed-experts")] = False
    """Keep beside the KV which experts each token was sent to, so that requests may ask for it
    (return_routed_experts): a byte for each expert of a token and layer, two above 255 experts."""
    weight_version: int = 0
    """Version that the loaded weights are served as."""
    refusal: Suppress[str] = ""
    """Why the loaded weights must not serve, if so: an engine that is started again after updates
    loads what is older than they were. It refuses to generate, with this reason, until a whole
    version is published; `weight_version` is the last one that was."""
    cache: OmitArgPrefixes[CacheConfig] = field(default_factory=CacheConfig)
    scheduler: OmitArgPrefixes[SchedulerConfig] = field(default_factory=SchedulerConfig)
    parallel: OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)
    memory: OmitArgPrefixes[MemoryConfig] = field(default_factory=MemoryConfig)
    speculative: OmitArgPrefixes[SpeculativeConfig] = field(default_factory=SpeculativeConfig)
    sessions: OmitArgPrefixes[SessionConfig] = field(default_factory=SessionConfig)

    @property
    def weight_seed(self) -> int:
        """Seed of random weights: equal on every replica that was not told otherwise."""
        return 0 if self.seed is None else self.seed
