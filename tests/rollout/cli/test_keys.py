"""Keys that stand in the environment, where no list of processes shows them."""

from __future__ import annotations

import pytest

import rollout.__main__ as cli
from rollout.http.config import ServeConfig
from rollout.router.config import RouterConfig


@pytest.mark.parametrize("command", ["serve --model m", "router"])
def test_a_key_of_the_environment_stands_in_for_its_flag(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ServeConfig | RouterConfig] = []
    monkeypatch.setattr(cli, "run_serve", seen.append)
    monkeypatch.setattr(cli, "run_router", seen.append)
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "of-the-environment")
    monkeypatch.setenv("SLIPSTREAM_ADMIN_API_KEY", "too")
    monkeypatch.setenv("SLIPSTREAM_WORKER_API_KEY", "a-workers")
    cli.main([*command.split(), "--api-key", "of-the-flag"])
    cli.main(command.split())
    assert [(one.api_key, one.admin_api_key) for one in seen] == [
        ("of-the-flag", "too"),
        ("of-the-environment", "too"),
    ]
    if isinstance(seen[0], RouterConfig):
        assert seen[0].worker_api_key == "a-workers"
