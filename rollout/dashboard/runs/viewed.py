"""What `python -m rollout view` serves: the page of one run, or a list of runs with a page each.

/                      the list
/runs/NAME/dashboard   the page of one of them, which asks for its data below /runs/NAME
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from html import escape
from pathlib import Path
from urllib.parse import quote, unquote, unquote_to_bytes

from starlette.responses import HTMLResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import InvalidRequest, SlipstreamError
from rollout.dashboard.page_files import PAGE
from rollout.dashboard.runs.lenient_json import whole_text
from rollout.dashboard.runs.run_config import is_run, require_run
from rollout.dashboard.runs.run_source import RunSource
from rollout.dashboard.standalone import PageConfig, page_app
from rollout.http.edge.browsers import BrowserRules, Headers
from rollout.http.edge.errors import error_response

_RUNS = "/runs/"
_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def viewed_app(folder: Path, config: PageConfig) -> tuple[ASGIApp, str]:
    """The application for a folder, and the path at which it begins. Raises InvalidRequest (`run`)
    for one that is no run's and has no run in it, (`--api-key`) for a list with a key."""
    try:
        is_list = folder.is_dir() and not is_run(folder) and bool(run_names(folder))
    except OSError as error:
        told = f"run: cannot read {str(folder)[:200]}: {error.strerror}"
        raise InvalidRequest(told, field="run") from error
    if is_list:
        if config.api_key:
            raise InvalidRequest(
                "--api-key: the list of runs has no key, and tells their names; give the folder of "
                "one run, or leave --api-key and --host out",
                field="--api-key",
            )
        return RunList(folder, config), "/"
    require_run(folder)
    return _Redirected(page_app(RunSource(folder), config)), PAGE


def run_names(folder: Path) -> list[str]:
    """Folders of runs in a folder, the one that was written to last first."""
    found: list[tuple[float, str]] = []
    for path in folder.iterdir():
        # One that cannot be looked into, or goes meanwhile, hides none of the others.
        with suppress(OSError):
            if path.is_dir() and is_run(path):
                found.append((path.stat().st_mtime, path.name))
    return [name for _, name in sorted(found, reverse=True)]


class RunList:
    """An ASGI application: the list of the runs in a folder, as they are when it is asked for, and
    the page of each."""

    def __init__(self, folder: Path, config: PageConfig) -> None:
        self._folder = folder
        self._config = config
        self._browsers = BrowserRules(config)
        self._pages: dict[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        if scope["type"] != "http":
            return
        try:
            # Before all else: whose pages may ask decides who is told names.
            headers, path = Headers(scope["headers"]), scope["path"]
            self._browsers.check(scope["method"], path, headers, control=False)
            app = await self._app(scope)
            await app(scope, receive, send)
        except SlipstreamError as error:
            await error_response(error, scope["path"])(scope, receive, send)

    async def _app(self, scope: Scope) -> ASGIApp:
        """What answers; the path becomes that of the page that it is for."""
        if scope["path"] == "/":
            return HTMLResponse(_list(self._folder, await self._names()), headers=_HEADERS)
        # Of the bytes that were sent: a name may be no UTF-8, and may have a slash in its place.
        path: bytes = scope["raw_path"]
        name, slash, rest = path.removeprefix(_RUNS.encode()).partition(b"/")
        if not path.startswith(_RUNS.encode()) or not slash:
            raise UnknownRun("the list of runs is at /", field="run")
        app = await self._page(os.fsdecode(unquote_to_bytes(name)))
        scope["raw_path"] = b"/" + rest
        scope["path"] = unquote(scope["raw_path"])
        return app

    async def _page(self, name: str) -> ASGIApp:
        if name not in self._pages:
            if name not in await self._names():
                raise UnknownRun(f"there is no run {name[:100]!r} in the folder", field="run")
            self._pages[name] = page_app(RunSource(self._folder / name), self._config)
        return self._pages[name]

    async def _names(self) -> list[str]:
        """Raises InvalidRequest (`run`) for a folder that cannot be read any more."""
        try:
            return await asyncio.to_thread(run_names, self._folder)
        except OSError as error:
            raise InvalidRequest(
                f"run: cannot read the folder of runs: {error.strerror}", field="run"
            ) from error


def _list(folder: Path, names: list[str]) -> str:
    links = [_link(name) for name in names]
    title = escape(whole_text(folder.resolve().name))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><h1>{title}</h1><ul>{''.join(links)}</ul></html>"
    )


def _link(name: str) -> str:
    shown = escape(whole_text(name))
    # A name may hold marks of direction, which are to turn nothing but itself.
    return f'<li><a href="{_RUNS[1:]}{quote(os.fsencode(name))}{PAGE}"><bdi>{shown}</bdi></a></li>'


class UnknownRun(InvalidRequest):
    """There is no such run in the folder."""

    status = 404


class _Redirected:
    """An application with its page at / too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the ASGI protocol."""
        at_root = scope["type"] == "http" and scope["path"] == "/"
        await (RedirectResponse(PAGE) if at_root else self._app)(scope, receive, send)
