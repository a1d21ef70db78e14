"""The command line of `serve`."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import UseAppendAction

from engine.config import (
    AttentionBackendName,
    CacheConfig,
    Device,
    DType,
    EngineConfig,
    LoadFormat,
    MemoryConfig,
    ParallelConfig,
    SchedulerConfig,
)
from rollout.cli.flag_ranges import check_numbers
from rollout.http.config import Restart, ServeConfig

_GIB = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model over HTTP: /generate, OpenAI's completions, and two RL dialects."""

    model: str
    """Hugging Face folder, GGUF file, or a config.json (with --load-format random)."""
    tp: int = 1
    """Tensor-parallel ranks, one GPU each."""
    host: str = "127.0.0.1"
    """Address to bind; beyond loopback, control routes need --admin-api-key."""
    port: int = 30000
    """Port to bind; 0 takes a free one."""
    served_model_name: str = ""
    """Name that /v1/models gives; by default the model's path."""
    api_key: str = ""
    """Bearer key of every route but /health."""
    admin_api_key: str = ""
    """Bearer key of the control routes, in place of --api-key."""
    load_format: LoadFormat = "auto"
    """Where the weights come from; 'random' needs only a config.json."""
    device: Device = "auto"
    """'auto' takes a GPU when there is one."""
    dtype: DType = "auto"
    """Weights and KV; 'auto' is bfloat16 where the device computes it fast, else float32."""
    context_length: int | None = None
    """Most tokens of a sequence; by default the model's own, at most 32768."""
    attention: AttentionBackendName = "auto"
    """Attention back end."""
    cuda_graphs: bool = True
    """On a GPU, replay decode steps as CUDA graphs."""
    capture_at_start: bool = False
    """Capture the graphs before the first request, not when a step first needs one."""
    max_running: int = 256
    """Most sequences running at once."""
    max_waiting: int = 65536
    """Most requests in the waiting queue; one more gets 503."""
    max_samples: int = 1024
    """Most samples (n) of one request."""
    trust_request_chat_template: bool = False
    """Render the chat_template that a request brings, in a process with limits."""
    kv_memory: float | None = None
    """GiB for the KV cache; by default a share of the free memory."""
    mem_fraction: float = 0.85
    """Share of free GPU memory for the KV cache, where --kv-memory is not given."""
    page_size: int = 16
    """Tokens a KV page holds."""
    prefix_cache: bool = True
    """Reuse the KV of shared prefixes."""
    enable_memory_saver: bool = False
    """Make release and resume of GPU memory work."""
    enable_weights_cpu_backup: bool = False
    """Keep released weights in host memory, and bring them back on resume."""
    trainer_memory: float = 0.0
    """GiB per GPU that a trainer beside the engine needs while the engine is awake."""
    trainer_training_memory: float = 0.0
    """GiB per GPU that it needs while the engine sleeps; what does not fit is refused at start."""
    reserve_shadow: bool = False
    """Leave room for a second copy of the weights, so that updates never write in place."""
    base_gpu: int = 0
    """First GPU of the replica, among those visible."""
    weight_version: int = 0
    """Version that the loaded weights are served as."""
    seed: int | None = None
    """Seed of requests that bring none, and of random weights; drawn and logged by default."""
    replica_id: str = ""
    """Sets this server apart from others that share its --seed."""
    incremental_streaming_output: bool = False
    """Native streams send what is new instead of everything so far."""
    max_body_mib: int = 64
    """Largest request body, MiB."""
    max_control_body_mib: int = 256
    """Largest body of a control route, MiB; it may carry tensors as base64."""
    max_held_body_mib: int = 1024
    """Bodies that are held at a time, MiB together; what does not fit gets 503."""
    restart: Restart = "never"
    """When the engine dies: 'never' leaves with exit code 1, 'on-failure' starts it again."""
    allowed_host: UseAppendAction[tuple[str, ...]] = ()
    """A name that the Host header may have; on loopback, this machine's own always may."""
    allowed_origin: UseAppendAction[tuple[str, ...]] = ()
    """An origin, such as https://example.org, whose web pages may call; '*' for all."""
    weights_root: UseAppendAction[tuple[str, ...]] = ()
    """A folder below which weights may be read by updates; needed beyond loopback."""
    rendezvous_host: UseAppendAction[tuple[str, ...]] = ()
    """A host or network (10.0.0.0/8) to meet trainers at, beside the caller's own address."""
    profile_root: str = ""
    """Folder below which /start_profile writes; 'slipstream-profiles' among temporary files."""
    receive_timeout_s: float = 60.0
    """Seconds for the headers, and then the body, of a request to arrive."""


def serve_config(args: Serve) -> ServeConfig:
    """The server that the options describe.

    Raises InvalidRequest naming an option whose value has no meaning.
    """
    check_numbers(args)
    return ServeConfig(
        engine=_engine_config(args),
        host=args.host,
        port=args.port,
        served_model_name=args.served_model_name,
        api_key=args.api_key,
        admin_api_key=args.admin_api_key,
        max_body_bytes=args.max_body_mib * _MIB,
        max_control_body_bytes=args.max_control_body_mib * _MIB,
        max_held_body_bytes=args.max_held_body_mib * _MIB,
        replica_id=args.replica_id,
        trust_request_chat_template=args.trust_request_chat_template,
        incremental_streaming_output=args.incremental_streaming_output,
        restart=args.restart,
        allowed_hosts=args.allowed_host,
        allowed_origins=args.allowed_origin,
        weights_roots=args.weights_root,
        rendezvous_hosts=args.rendezvous_host,
        profile_root=args.profile_root,
        receive_timeout_s=args.receive_timeout_s,
    )


def _engine_config(args: Serve) -> EngineConfig:
    return EngineConfig(
        model=args.model,
        load_format=args.load_format,
        device=args.device,
        dtype=args.dtype,
        context_length=args.context_length,
        attention=args.attention,
        cuda_graphs=args.cuda_graphs,
        capture_at_start=args.capture_at_start,
        seed=args.seed,
        weight_version=args.weight_version,
        cache=CacheConfig(
            page_size=args.page_size,
            memory_bytes=None if args.kv_memory is None else int(args.kv_memory * _GIB),
            memory_fraction=args.mem_fraction,
            prefix_cache=args.prefix_cache,
        ),
        scheduler=SchedulerConfig(
            max_running=args.max_running,
            max_waiting=args.max_waiting,
            max_samples=args.max_samples,
        ),
        parallel=ParallelConfig(tp_size=args.tp, base_gpu=args.base_gpu),
        memory=MemoryConfig(
            saver=args.enable_memory_saver,
            cpu_backup=args.enable_weights_cpu_backup,
            trainer_bytes=int(args.trainer_memory * _GIB),
            trainer_training_bytes=int(args.trainer_training_memory * _GIB),
            reserve_shadow=args.reserve_shadow,
        ),
    )
