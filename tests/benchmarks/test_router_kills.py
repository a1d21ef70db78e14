"""kill -9 of one of three workers of a real model: in no dialect is anything lost or different."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "count",
    [pytest.param(52, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)],
)
def test_every_dialect_goes_on(
    count: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from router_kills import measure

    found = measure(count)
    assert (found["replies"], found["different"]) == (count, 0), found["first_different"]
    assert found["resumed"] > 0
    assert found["sequences_gone_on"] > 0
    # Of a sequence, what comes within the time of a flush, and what is on its way; one whose server
    # was kept from running beside others may lose more.
    assert found["again_tokens_mean"] <= 8
