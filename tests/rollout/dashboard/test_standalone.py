"""The page of a run as an application of its own: what it sends, and to whom."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from engine.errors import InvalidRequest
from rollout.dashboard.page_files import file_names
from rollout.dashboard.standalone import PageConfig, page_app
from tests.helpers.dashboard_source import GROUP_SIZE, MadeUpSource

KEY = {"authorization": "Bearer sesame"}


def client(*, source: MadeUpSource | None = None, **config: Any) -> httpx.AsyncClient:
    app = page_app(source or MadeUpSource(), PageConfig(**config))
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:30100")
