"""Keys of a server or router from the environment: those of a command line are everybody's to read,
who may list the processes of the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from rollout.http.config import ServeConfig
from rollout.router.config import RouterConfig

KEYS: Mapping[str, str] = MappingProxyType(
    {
        "api_key": "SLIPSTREAM_API_KEY",
        "admin_api_key": "SLIPSTREAM_ADMIN_API_KEY",
        "worker_api_key": "SLIPSTREAM_WORKER_API_KEY",
        "worker_admin_api_key": "SLIPSTREAM_WORKER_ADMIN_API_KEY",
    }
)
"""Variables by the field that they stand in for; those of workers are a router's."""

Config = TypeVar("Config", ServeConfig, RouterConfig)


def with_keys(config: Config, environment: Mapping[str, str]) -> Config:
    """The configuration with what the environment has of keys that no flag gave."""
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    found: dict[str, Any] = {
        name: environment[variable]
        for name, variable in KEYS.items()
        if known.get(name) == "" and environment.get(variable)
    }
    return dataclasses.replace(config, **found)
