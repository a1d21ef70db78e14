"""Configuration of one server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import EngineConfig
from engine.protocol.deadlines import REPLY_S, START_S

Restart = Literal["never", "on-failure"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One HTTP server and the engine behind it."""

    engine: EngineConfig
    """What the engine is built from."""
    host: str = "127.0.0.1"
    """Address to bind; on any other than loopback, control routes need an admin key."""
    port: int = 30000
    """Port to bind; 0 takes a free one."""
    served_model_name: str = ""
    """Name that /v1/models gives; the model's path if empty."""
    api_key: str = ""
    """Bearer key of every route but /health; no key if empty."""
    admin_api_key: str = ""
    """Bearer key of the control routes in place of `api_key`."""
    max_body_bytes: int = 64 << 20
    """Largest request body."""
    max_control_body_bytes: int = 256 << 20
    """Largest body of a control route, which may carry tensors as base64."""
    max_held_body_bytes: int = 1 << 30
    """Bytes of all bodies that are on their way, and of those over 1 MiB until their replies."""
    replica_id: str = ""
    """Sets apart servers that share one engine seed: each derives other seeds of requests."""
    trust_request_chat_template: bool = False
    """Render the `chat_template` that a request brings, in a process with limits."""
    incremental_streaming_output: bool = False
    """Native streams send what is new instead of everything so far."""
    restart: Restart = "never"
    """What follows when the engine dies: the server leaves, or starts the engine again."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a Host header may have; bound to loopback, those of this machine always may."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose web pages may call; "*" allows every page."""
    weights_roots: tuple[str, ...] = ()
    """Folders that weights may be read from; without any, all folders if bound to loopback, none
    on other addresses."""
    rendezvous_hosts: tuple[str, ...] = ()
    """Hosts and networks where the engine may meet a trainer, beside the caller's own address;
    without any, all if bound to loopback."""
    profile_root: str = ""
    """Folder below which profiles are written; one of the system's temporary files if empty."""
    receive_timeout_s: float = 60.0
    """Within which the headers, and then the body, of a request have to arrive."""
    reply_s: float = REPLY_S
    """Deadline for the engine to answer a command that touches no weights."""
    start_s: float = START_S
    """Deadline for loading the model, and for commands that touch weights or memory."""

    @property
    def model_name(self) -> str:
        """Name of the model in replies."""
        return self.served_model_name or self.engine.model
