"""Run a server: spawn the engine, bind, serve until told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop

from engine.errors import InvalidRequest, ModelNotFound
from rollout.http.app import build_app
from rollout.http.config import ServeConfig
from rollout.http.engine_client import AsyncEngine
from rollout.http.guard import is_loopback
from rollout.http.link import ProcessLink
from rollout.http.services import make_services
from rollout.process_replica import ProcessReplica
from rollout.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_GRACE_S = 3
_BACKLOG = 4096
_FACTORY = "engine.executor:build_executor"


def serve(config: ServeConfig, *, factory: str = _FACTORY) -> None:
    """Serve until SIGTERM or SIGINT; no process is left then.

    factory: "module:function" that builds the executor in the leader's process.
    Raises InvalidRequest (`--host, --port`) if the address cannot be bound, ModelError or
    OutOfMemory if the engine cannot start.
    """
    _leave_by_exception()
    with _bind(config) as listener:
        tokenizer = server_tokenizer(config.engine.model)
        replica = ProcessReplica(
            config.engine, factory=factory, start_s=config.start_s, reply_s=config.reply_s
        )
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(config, replica, tokenizer, listener))
        finally:
            replica.close()


def server_tokenizer(model: str) -> Tokenizer | None:
    """The model's tokenizer; None, with a warning, for a model that came without one. Raises
    ModelNotFound if there is no model either."""
    try:
        return load_tokenizer(model)
    except ModelNotFound:
        if not Path(model).exists():
            raise
        logger.warning("no tokenizer beside %s: only input_ids are served", model)
        return None


async def _serve(
    config: ServeConfig,
    replica: ProcessReplica,
    tokenizer: Tokenizer | None,
    listener: socket.socket,
) -> None:
    engine = AsyncEngine(ProcessLink(replica), reply_s=config.reply_s, slow_s=config.start_s)
    await engine.start()
    app = build_app(make_services(config, engine, tokenizer))
    host, port = listener.getsockname()[:2]
    listener.listen(_BACKLOG)
    logger.info("serving %s at http://%s:%d", config.model_name, host, port)
    if not is_loopback(config.host) and not config.admin_api_key:
        logger.warning("control routes answer 403 at %s without --admin-api-key", config.host)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            backlog=_BACKLOG,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    await server.serve(sockets=[listener])


def _leave_by_exception() -> None:
    """SIGTERM unwinds the stack, also while the model loads, so that the engine is ended."""

    def leave(_: int, __: FrameType | None) -> None:
        raise SystemExit(0)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


def _bind(config: ServeConfig) -> socket.socket:
    """The listening socket, bound before the model is loaded: a port in use shows at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise InvalidRequest(
            f"cannot bind {config.host}:{config.port}: {error}; is another server there?",
            field="--host, --port",
        ) from error
    return listener
