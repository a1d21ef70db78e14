"""`python -m rollout view RUN`: the page of a run's folder, live or finished."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

logger = logging.getLogger("rollout")


@dataclass(frozen=True, kw_only=True)
class View:
    """Show the folder of a run in a browser, whether it goes on or is over; or a folder of runs, as
    a list."""

    run: Positional[str]
    """Folder that recipes/grpo.py, ppo.py or sft.py wrote, or one with such folders in it."""
    host: str = "127.0.0.1"
    """Address to bind; others than loopback take --api-key."""
    port: int = 0
    """Port to bind; 0 takes a free one."""
    api_key: str = ""
    """Key that the page asks for before it shows anything."""
    allowed_hosts: Annotated[UseAppendAction[tuple[str, ...]], arg(name="allowed-host")] = ()
    """Further names under which browsers may reach it."""


def run_view(view: View) -> None:
    """`view`: serve the page until an interrupt. Raises InvalidRequest naming the folder or the
    flag."""
    # Only a page needs the HTTP stack.
    from rollout.dashboard.runs.page_server import serve_page
    from rollout.dashboard.runs.viewed import viewed_app
    from rollout.dashboard.standalone import PageConfig
    from rollout.http.listeners import bind

    config = PageConfig(
        host=view.host, port=view.port, api_key=view.api_key, allowed_hosts=view.allowed_hosts
    )
    app, path = viewed_app(Path(view.run), config)
    with bind(config) as listener:
        port = listener.getsockname()[1]
        host = f"[{view.host}]" if ":" in view.host else view.host
        logger.info("%s at http://%s:%d%s (Ctrl-C ends it)", view.run, host, port, path)
        serve_page(app, listener)
