"""Any JSON value in any field of any route: 2xx or 4xx in the one error shape, and an engine that
answers afterwards.

Cases share a server until one of them has told the engine something. `make test` draws some
cases of each body, the same on every run; `make test-long` gives every field of every route
every value.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.helpers.hostile_json import HOSTILE, any_json, with_value
from tests.helpers.route_bodies import RouteBody, query_routes, route_bodies
from tests.helpers.shared_server import SharedServer

pytestmark = pytest.mark.slow

ROUTES = list(route_bodies())
# A stream that ends with its reader takes the query of /dashboard/api/now, which is here.
QUERIES = [query for query in query_routes() if query[1] != "/dashboard/api/live"]
seeded = settings(
    max_examples=20,
    phases=(Phase.explicit, Phase.generate),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def shared() -> Iterator[SharedServer]:
    with SharedServer() as server:
        yield server


@pytest.mark.parametrize("route", ROUTES, ids=str)
@seeded
@given(data=st.data())
def test_a_spoiled_field(shared: SharedServer, route: RouteBody, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(route.paths))
    content = with_value(route.body, path, data.draw(any_json()))
    shared.survives(route.method, route.path, content=content)


@pytest.mark.long
@pytest.mark.parametrize("route", [r for r in ROUTES if r.method != "PUT"], ids=str)
def test_every_value_in_every_field(shared: SharedServer, route: RouteBody) -> None:
    """PUT is left out: it is POST's handler."""
    for path in route.paths:
        for name, text in HOSTILE.items():
            try:
                content = with_value(route.body, path, text)
                shared.survives(route.method, route.path, content=content)
            except BaseException as error:
                error.add_note(f"{route}, field {path}, {name}")
                raise


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_the_example_itself(shared: SharedServer, route: RouteBody) -> None:
    shared.survives(route.method, route.path, json=route.body)


TEXTS = ("", "-1", "1e308", "NaN", "9" * 400, "null", "[1]", "a", "%00", "x" * 5_000, "\U0001f600")


@pytest.mark.parametrize("method,path,name", QUERIES)
def test_any_text_in_any_query(shared: SharedServer, method: str, path: str, name: str) -> None:
    for text in TEXTS:
        shared.survives(method, path, params={name: text})


RAW = {
    "empty": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"text": "\xff\xfe"}',
    "a number": b"1",
    "NUL": b"\0" * 100,
    "deep": b"[" * 100_000,
    "a key twice": b'{"input_ids": [1], "input_ids": [2], "text": 1, "text": "a"}',
    "a byte order mark": b'\xef\xbb\xbf{"input_ids": [1]}',
    "another encoding": '{"input_ids": [1]}'.encode("utf-16"),
    "objects without an end": b"{" * 3000,
    "two objects": b'{"a": 1}' * 2,
}


@pytest.mark.parametrize("path", sorted({route.path for route in ROUTES}))
def test_bodies_that_are_no_object(shared: SharedServer, path: str) -> None:
    for body in RAW.values():
        shared.survives("POST", path, content=body)
