"""Endpoints that cannot roll out for a run are refused before it begins, by the flag's name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.errors import EngineDead, Forbidden, InvalidRequest, SlipstreamError, Unauthorized
from recipes.actors.endpoints import ADMIN_API_KEY, API_KEY, _is_router, open_endpoints, open_fleet
from recipes.settings.command_line import with_values
from recipes.settings.options import RunOptions
from recipes.world import World
from tests.helpers.char_model import char_model, write_char_model
from tests.helpers.live_fleet import LiveFleet, live_fleet


@pytest.fixture(scope="module")
def fleet():
    with live_fleet(2, admin_api_key="secret") as found:
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("char_model")
    write_char_model(folder, char_model(16, 1))
    return str(folder)


def opened(model: str, **values: Any) -> SlipstreamError:
    options = with_values(RunOptions(model=model), {"endpoint_patience": 0.2, **values})
    with pytest.raises(SlipstreamError) as caught:
        open_fleet(open_endpoints, options, World(), device=torch.device("cpu"))
    return caught.value


def test_another_model_is_refused_by_what_differs(
    fleet: LiveFleet, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADMIN_API_KEY, "secret")
    error = opened(model, endpoint=(fleet.url,))
    assert isinstance(error, InvalidRequest) and error.field == "endpoint"
    assert "serves a model with class FakeForCausalLM" in error.message
    alone = opened(model, endpoint=(fleet.servers[0].url,))
    assert isinstance(alone, InvalidRequest) and fleet.servers[0].url in alone.message


def test_a_router_stands_alone_and_takes_its_key(
    fleet: LiveFleet, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = opened(model, endpoint=(fleet.url,))
    assert (type(error).__name__, error.field) == ("Unauthorized", "endpoint")
    monkeypatch.setenv(API_KEY, "none")
    monkeypatch.setenv(ADMIN_API_KEY, "secret")
    error = opened(model, endpoint=(fleet.url, fleet.servers[0].url))
    assert "is a router, and stands for all its workers" in error.message


def test_nobody_at_the_endpoint_is_told_after_the_patience(model: str, tmp_path: Path) -> None:
    error = opened(model, endpoint=("http://127.0.0.1:9",))
    assert isinstance(error, EngineDead) and error.field == "endpoint"
    assert error.message.startswith("endpoint: http://127.0.0.1:9 is not ready for 0.2 s")


@pytest.mark.parametrize("error", [EngineDead("gone"), Unauthorized("a key"), Forbidden("open")])
def test_who_does_not_say_whether_it_is_a_router_is_not_taken_for_a_server(
    error: SlipstreamError,
) -> None:
    def call(path: str) -> Any:
        raise error

    replica: Any = SimpleNamespace(client=SimpleNamespace(call=call))
    with pytest.raises(type(error), match=error.message) as caught:
        _is_router(replica)
    assert caught.value.field == "endpoint"
