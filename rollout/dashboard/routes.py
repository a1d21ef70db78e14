"""The page and its data, over any source. The guard of the server that mounts them asks for the
key: /dashboard and its files are open, everything below /dashboard/api/ is not.
"""

from __future__ import annotations

from fastapi import Request, Response

from rollout.dashboard.live import LiveQuery, live, look
from rollout.dashboard.page_files import PAGE, STATIC, file_response
from rollout.dashboard.rollouts import RolloutQuery
from rollout.dashboard.source import Source
from rollout.http.edge.errors import json_response
from rollout.http.edge.read_body import read_query
from rollout.http.edge.routes import Routes
from rollout.http.edge.sse import EventStream
from rollout.http.openapi import takes

API = "/dashboard/api"


def router(source: Source) -> Routes:
    """The routes over one source."""
    routes = Routes()

    async def page(request: Request) -> Response:
        return file_response("index.html", request)

    async def file(name: str, request: Request) -> Response:
        return file_response(name, request)

    async def present(request: Request) -> Response:
        return json_response(await look(source, read_query(request, LiveQuery)))

    async def stream(request: Request) -> Response:
        return EventStream(live(source, read_query(request, LiveQuery)))

    async def rollouts(request: Request) -> Response:
        return json_response(await source.rollouts(read_query(request, RolloutQuery)))

    async def group(group: str) -> Response:
        return json_response(await source.rollout_group(group))

    routes.add_api_route(PAGE, page, methods=["GET"])
    routes.add_api_route(STATIC + "{name}", file, methods=["GET"])
    cursors = takes(query=LiveQuery)
    routes.add_api_route(f"{API}/now", present, methods=["GET"], openapi_extra=cursors)
    routes.add_api_route(f"{API}/live", stream, methods=["GET"], openapi_extra=cursors)
    routes.add_api_route(
        f"{API}/rollouts", rollouts, methods=["GET"], openapi_extra=takes(query=RolloutQuery)
    )
    routes.add_api_route(f"{API}/rollouts/{{group}}", group, methods=["GET"])
    return routes
