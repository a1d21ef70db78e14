"""Configuration of a router, from which `tyro` builds the options of `router`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Suppress, UseAppendAction, arg

from engine.config import MIB, bytes_option
from rollout.logs.logging_setup import LogFormat, LogLevel

PolicyName = Literal["cache_aware", "least_load", "round_robin"]


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Serve several servers of one model at one address."""

    host: str = "127.0.0.1"
    """Address to bind; beyond loopback, control routes and registration need --admin-api-key."""
    port: int = 30000
    """Port to bind; 0 takes a free one."""
    workers: Annotated[UseAppendAction[tuple[str, ...]], arg(name="worker")] = ()
    """A server's URL, such as http://10.0.0.5:30000; others may register later."""
    policy: PolicyName = "cache_aware"
    """Who gets a request: who has its prompt cached, who has least to do, or each in turn."""
    journal: bool = True
    """Keep what was sampled of open requests, so that another worker goes on if one dies."""
    api_key: str = ""
    """Bearer key of every route but /health; by default SLIPSTREAM_API_KEY of the environment,
    which no list of processes shows."""
    admin_api_key: str = ""
    """Bearer key of control routes and registration, in place of --api-key; by default
    SLIPSTREAM_ADMIN_API_KEY of the environment."""
    worker_api_key: str = ""
    """The workers' --api-key, by default SLIPSTREAM_WORKER_API_KEY; without any, clients' own keys
    are passed on."""
    worker_admin_api_key: str = ""
    """The workers' --admin-api-key, by default SLIPSTREAM_WORKER_ADMIN_API_KEY, likewise."""
    allowed_hosts: Annotated[UseAppendAction[tuple[str, ...]], arg(name="allowed-host")] = ()
    """A name that the Host header may have; on loopback, this machine's own always may."""
    allowed_origins: Annotated[UseAppendAction[tuple[str, ...]], arg(name="allowed-origin")] = ()
    """An origin, such as https://example.org, whose web pages may call; '*' for all."""
    max_body_bytes: Annotated[int, arg(name="max-body-mib"), bytes_option(MIB, int)] = 64 * MIB
    """Largest request body, MiB."""
    max_control_body_bytes: Annotated[
        int, arg(name="max-control-body-mib"), bytes_option(MIB, int)
    ] = 256 * MIB
    """Largest body of a control route, MiB."""
    max_held_body_bytes: Annotated[int, arg(name="max-held-body-mib"), bytes_option(MIB, int)] = (
        4096 * MIB
    )
    """Bodies that are held at a time, MiB together, each until its reply; what does not fit gets
    503."""
    receive_timeout_s: float = 60.0
    """Seconds for a request to arrive."""
    send_timeout_s: float = 300.0
    """Seconds after which a client that takes nothing of its reply loses its connection."""
    silence_s: float = 30.0
    """Seconds without a byte from a worker that has requests, after which it is asked how it is."""
    patience_s: float = 30.0
    """Seconds that a request whose worker was lost waits for another, while there is none."""
    log_format: LogFormat = "text"
    """Lines of the log for people, or 'json', an object a line (docs/operations.md)."""
    log_level: LogLevel = "info"
    """Least level of lines of the log."""
    connect_s: Suppress[float] = 3.0
    """Deadline for a connection to a worker."""
