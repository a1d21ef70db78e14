"""Configuration of one server, from which `tyro` builds the options of `serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Suppress, UseAppendAction, arg

from engine.config import MIB, EngineConfig, bytes_option
from engine.protocol.deadlines import REPLY_S, START_S
from rollout.logs.logging_setup import LogFormat, LogLevel

Restart = Literal["never", "on-failure"]
RerankForm = Literal["results", "list"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a model over HTTP: /generate, OpenAI's completions, and two RL dialects."""

    engine: OmitArgPrefixes[EngineConfig]
    """What the engine is built from."""
    host: str = "127.0.0.1"
    """Address to bind; beyond loopback, control routes need --admin-api-key."""
    port: int = 30000
    """Port to bind; 0 takes a free one."""
    served_model_name: str = ""
    """Name that /v1/models gives; by default the model's path."""
    api_key: str = ""
    """Bearer key of every route but /health; by default SLIPSTREAM_API_KEY of the environment,
    which no list of processes shows."""
    admin_api_key: str = ""
    """Bearer key of the control routes, in place of --api-key; by default
    SLIPSTREAM_ADMIN_API_KEY of the environment."""
    max_body_bytes: Annotated[int, arg(name="max-body-mib"), bytes_option(MIB, int)] = 64 * MIB
    """Largest request body, MiB."""
    max_control_body_bytes: Annotated[
        int, arg(name="max-control-body-mib"), bytes_option(MIB, int)
    ] = 256 * MIB
    """Largest body of a control route, MiB; it may carry tensors as base64."""
    max_held_body_bytes: Annotated[int, arg(name="max-held-body-mib"), bytes_option(MIB, int)] = (
        1024 * MIB
    )
    """Bodies that are held at a time, MiB together; what does not fit gets 503. Those are held
    that are on their way, and those over 1 MiB until their replies."""
    replica_id: str = ""
    """Sets this server apart from others that share its --seed."""
    trust_request_chat_template: bool = False
    """Render the chat_template that a request brings, in a process with limits."""
    incremental_streaming_output: bool = False
    """Native streams send what is new instead of everything so far."""
    tool_parser: str = ""
    """How the model writes calls of functions, such as hermes, or 'none'; by default as its chat
    template tells (docs/tool_calls.md)."""
    reasoning_parser: str = ""
    """How the model writes its thinking, such as qwen3, or 'none'; by default as its chat template
    tells."""
    rerank_form: RerankForm = "results"
    """What /rerank and /v1/rerank reply: 'results', the object of Jina and Cohere, or 'list', the
    bare list of SGLang's server; a body may say so by its `form`."""
    router: str = ""
    """URL of a router to register with (docs/router.md); its admin key is --admin-api-key."""
    restart: Restart = "never"
    """When the engine dies: 'never' leaves with exit code 1, 'on-failure' starts it again."""
    allowed_hosts: Annotated[UseAppendAction[tuple[str, ...]], arg(name="allowed-host")] = ()
    """A name that the Host header may have; on loopback, this machine's own always may."""
    allowed_origins: Annotated[UseAppendAction[tuple[str, ...]], arg(name="allowed-origin")] = ()
    """An origin, such as https://example.org, whose web pages may call; '*' for all."""
    weights_roots: Annotated[UseAppendAction[tuple[str, ...]], arg(name="weights-root")] = ()
    """A folder below which weights may be read by updates; needed beyond loopback."""
    rendezvous_hosts: Annotated[UseAppendAction[tuple[str, ...]], arg(name="rendezvous-host")] = ()
    """A host or network (10.0.0.0/8) to meet trainers at, beside the caller's own address; on
    loopback without any, trainers are met everywhere."""
    profile_root: str = ""
    """Folder below which /start_profile writes; 'slipstream-profiles' among temporary files."""
    http_processes: int = 1
    """Processes that read requests, and write replies and text, before the one engine. With more
    than one, another process owns the engine and everything that steers it."""
    receive_timeout_s: float = 60.0
    """Seconds for the headers, and then the body, of a request to arrive."""
    send_timeout_s: float = 300.0
    """Seconds after which a client that takes nothing of its reply, or that cannot be reached any
    more, loses its connection."""
    request_timeout_s: float = 0.0
    """Seconds that a request without a timeout_s may take; then it is answered with the tokens that
    it has. 0 for no limit."""
    max_request_timeout_s: float = 0.0
    """Most seconds that any request may take, whatever its timeout_s says; 0 for no limit."""
    drain_timeout_s: float = 30.0
    """Seconds that requests have to finish after SIGTERM, while new ones are refused; 0 ends them
    at once, with the tokens that they have."""
    stuck_step_s: float = 60.0
    """Seconds of one step or command after which the stacks of the engine's processes are logged,
    and written to a file that the log names; 0 for never."""
    log_format: LogFormat = "text"
    """Lines of the log for people, or 'json', an object a line (docs/operations.md)."""
    log_level: LogLevel = "info"
    """Least level of lines of the log."""
    access_log: bool = False
    """Log a line for each request: who, which route, how long, how many tokens."""
    otel: bool = False
    """A span of OpenTelemetry for each request, sent to where OTEL_EXPORTER_OTLP_ENDPOINT says;
    needs the extra 'otel'."""
    reply_s: Suppress[float] = REPLY_S
    """Deadline for the engine to answer a command that touches no weights."""
    start_s: Suppress[float] = START_S
    """Deadline for loading the model, and for commands that touch weights or memory."""

    @property
    def model_name(self) -> str:
        """Name of the model in replies."""
        return self.served_model_name or self.engine.model
