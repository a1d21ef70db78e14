"""Configuration of one engine replica: frozen, resolved once, never mutated.

Torch-free: `rollout` reads it too. Fields documented here are the help text of the
command line, which `tyro` builds from these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LoadFormat = Literal["auto", "safetensors", "gguf", "random"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
AttentionBackendName = Literal["auto", "torch_native", "triton", "flashinfer", "split"]
KernelBackend = Literal["torch", "triton"]
QueuePolicy = Literal["fcfs", "longest_prefix"]

DEFAULT_CONTEXT_LIMIT = 32768
"""Most tokens of a sequence where no `context_length` is given, whatever the model could take."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV pool and the prefix cache."""

    page_size: int = 16
    """Tokens a KV page holds."""
    num_pages: int | None = None
    """KV pages to allocate; None sizes the pool from `memory_bytes` or `memory_fraction`."""
    memory_bytes: int | None = None
    """Bytes for the KV pool; None takes `memory_fraction` of what is free."""
    memory_fraction: float = 0.85
    """Share of free GPU memory for the KV pool (on CPU: a quarter of this share)."""
    prefix_cache: bool = True
    """Reuse the KV of shared prefixes through the radix tree."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What the scheduler may put into one step and how it orders the waiting queue."""

    max_running: int = 256
    """Most sequences running at once; each holds one slot of the device tables."""
    max_step_tokens: int = 8192
    """Most tokens computed in one step, prefill and decode together."""
    max_chunk_tokens: int = 2048
    """Longest piece of one prompt computed in one step."""
    max_waiting: int = 65536
    """Most requests in the waiting queue; one more is refused."""
    max_samples: int = 1024
    """Most samples (`n`) of one request."""
    policy: QueuePolicy = "longest_prefix"
    """Order of the waiting queue: arrival, or longest cached prefix first."""
    starvation_steps: int = 64
    """Plans that may pass a waiting request over before it goes first."""
    overlap: bool | None = None
    """Plan a step while the one before it runs; None does so on a GPU. Same outputs."""
    check_integrity: bool = False
    """Check slots, pages and the whole prefix tree whenever the engine has become idle."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks a replica has and how long they wait for each other."""

    tp_size: int = 1
    """Tensor-parallel ranks, one GPU each; 1, 2, 4 or 8."""
    base_gpu: int = 0
    """First GPU of the replica, among those visible."""
    timeout_s: float = 60.0
    """Deadline of a collective; a rank that misses it ends the replica with EngineDead."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Giving GPU memory back between rollouts, and sharing it with a trainer."""

    saver: bool = False
    """Allocate weights and KV so that release and resume work; on a GPU this takes
    torch-memory-saver."""
    cpu_backup: bool = False
    """Keep released weights in pinned host memory, and bring them back on resume."""
    trainer_bytes: int = 0
    """GPU memory per rank that a trainer beside the engine needs while the engine is awake."""
    trainer_training_bytes: int = 0
    """GPU memory per rank that the trainer needs at the peak of its step, the engine asleep."""
    trainer_publishing_bytes: int = 0
    """GPU memory per rank that the trainer needs while it publishes, its buckets included."""
    reserve_shadow: bool = False
    """Leave room for a second copy of the weights, so that updates never write in place."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything a replica is built from."""

    model: str
    """Hugging Face folder, GGUF file, or a config.json (with load_format 'random')."""
    load_format: LoadFormat = "auto"
    """Where the weights come from; 'random' needs only a config.json."""
    device: Device = "auto"
    """'auto' takes a GPU when torch sees one."""
    dtype: DType = "auto"
    """Weights and KV; 'auto' is bfloat16 where the device computes it fast, else float32."""
    context_length: int | None = None
    """Most tokens of a sequence; None takes the model's own, at most 32768."""
    attention: AttentionBackendName = "auto"
    """Attention back end: 'triton' and 'flashinfer' need a GPU, 'split' takes prefill from
    flashinfer and decode from triton; 'auto' asks engine.attention.select."""
    cuda_graphs: bool = True
    """On a GPU, replay decode steps as CUDA graphs; off runs every step kernel by kernel."""
    capture_at_start: bool = False
    """Capture the graphs of every batch size at start-up, not when a step first needs one."""
    seed: int | None = None
    """Seed of requests that bring none, and of random weights; None draws the first from the
    operating system, and gives random weights their fixed seed 0."""
    weight_version: int = 0
    """Version the loaded weights are served as."""
    refusal: str = ""
    """Why the loaded weights must not serve, if so: an engine that is started again after updates
    loads what is older than they were. It refuses to generate, with this reason, until a whole
    version is published; `weight_version` is the last one that was."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    @property
    def weight_seed(self) -> int:
        """Seed of random weights: equal on every replica that was not told otherwise."""
        return 0 if self.seed is None else self.seed
