"""What `python -m rollout view` serves: the page of one run, or a list of runs with a page each.

/                      the list
/runs/NAME/dashboard   the page of one of them, which asks for its data below /runs/NAME
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

from starlette.responses import HTMLResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import InvalidRequest, SlipstreamError
from rollout.dashboard.page_files import PAGE
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
    found = [path for path in folder.iterdir() if path.is_dir() and is_run(path)]
    return [path.name for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)]


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
            await self._app(scope)(scope, receive, send)
        except SlipstreamError as error:
            await error_response(error, scope["path"])(scope, receive, send)

    def _app(self, scope: Scope) -> ASGIApp:
        """What answers; the path becomes that of the page that it is for."""
        path: str = scope["path"]
        if path == "/":
            self._browsers.check(scope["method"], path, Headers(scope["headers"]), control=False)
            return HTMLResponse(self._list(), headers=_HEADERS)
        name, slash, rest = path.removeprefix(_RUNS).partition("/")
        if not path.startswith(_RUNS) or not slash:
            raise UnknownRun("the list of runs is at /", field="run")
        app = self._page(name)
        scope["path"] = f"/{rest}"
        scope["raw_path"] = scope["path"].encode()
        return app

    def _page(self, name: str) -> ASGIApp:
        if name not in self._pages:
            if name not in run_names(self._folder):
                raise UnknownRun(f"{self._folder} has no run {name[:100]!r}", field="run")
            self._pages[name] = page_app(RunSource(self._folder / name), self._config)
        return self._pages[name]

    def _list(self) -> str:
        names = run_names(self._folder)
        links = [f'<li><a href="{_RUNS[1:]}{quote(n)}{PAGE}">{escape(n)}</a></li>' for n in names]
        title = escape(self._folder.resolve().name)
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{title}</title><h1>{title}</h1><ul>{''.join(links)}</ul></html>"
        )


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
