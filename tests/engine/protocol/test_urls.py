"""What is taken for the URL of a server."""

from __future__ import annotations

import pytest

from engine.protocol.urls import url_fault


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:30000",
        "https://trainer.example",
        "http://[::1]:8000",
        "http://proxy/engines/0",
        "http://xn--bcher-kva.example",
    ],
)
def test_servers(url: str) -> None:
    assert url_fault(url) == url_fault(f"{url}//") == ""


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:30000",
        "ftp://host",
        "http://",
        "http://:8000",
        "http://host:port",
        "http://host:99999",
        "http://[::1",
        "http://[host]",
        f"http://{'a' * 64}",
        "http://host..name",
        "http://host name",
        "http://host\n:1",
        "http://host/ü",
        "http://bücher.example",
        "http://host?key=1",
        "http://host#top",
    ],
)
def test_what_no_server_is_called(url: str) -> None:
    assert "no URL of a server" in url_fault(url)
