"""Routes are handlers of a request, of parts of its path, or of both."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from rollout.http.edge.routes import Routes
from tests.helpers.http_app import run


async def nothing() -> Response:
    return Response("nothing")


async def whole(_: Request) -> Response:
    return Response(_.url.path)


async def part(name: str) -> Response:
    return Response(name)


async def both(name: str, request: Request) -> Response:
    return Response(f"{name} by {request.method}")


def made() -> Routes:
    routes = Routes()
    routes.add_api_route("/nothing", nothing, methods=["GET"])
    routes.add_api_route("/whole", whole, methods=["GET", "PUT"])
    routes.add_api_route("/part/{name}", part, methods=["GET"])
    routes.add_api_route("/paths/{name:path}", part, methods=["GET"])
    routes.add_api_route("/both/{name}", both, methods=["POST"], openapi_extra={"body": int})
    routes.add_api_route("/of/{owner}/{name}", both, methods=["POST"])
    return routes


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("GET", "/nothing", "nothing"),
        ("PUT", "/whole", "/whole"),
        ("GET", "/part/a", "a"),
        ("GET", "/paths/a/b", "a/b"),
        ("POST", "/both/a", "a by POST"),
        ("POST", "/of/b/a", "a by POST"),
    ],
)
def test_a_handler_gets_what_it_takes(method: str, path: str, said: str) -> None:
    async def test() -> None:
        transport = httpx.ASGITransport(app=FastAPI(routes=made().routes))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            assert (await http.request(method, path)).text == said

    run(test)


def test_what_reads_only_a_request_is_called_as_it_is() -> None:
    found = {route.path: route for route in made().routes}
    assert found["/whole"].endpoint is whole
    assert found["/both/{name}"].openapi_extra == {"body": int}


def test_no_route_answers_what_it_does_not_name() -> None:
    async def test() -> None:
        transport = httpx.ASGITransport(app=FastAPI(routes=made().routes))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            for method in ("HEAD", "POST", "PUT"):
                reply = await http.request(method, "/nothing")
                assert (reply.status_code, reply.headers["allow"]) == (405, "GET")
            assert (await http.get("/part/a/b")).status_code == 404

    run(test)


def test_a_handler_that_takes_more_than_its_path_has_is_no_route() -> None:
    async def many(name: str, request: Request) -> Response:
        return Response()

    with pytest.raises(AssertionError, match="no parts of its path"):
        Routes().add_api_route("/x", many, methods=["GET"])
