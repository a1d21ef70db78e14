"""Spans of requests: names, attributes, events and parents, as OpenTelemetry has them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from engine.errors import InvalidRequest
from rollout.http.observing.traces import Traces, check_otel
from tests.helpers.http_app import run, serving

HAS_SDK = find_spec("opentelemetry") is not None and find_spec("opentelemetry.sdk") is not None
needs_sdk = pytest.mark.skipif(not HAS_SDK, reason="opentelemetry-sdk is not installed")
BODY = {
    "input_ids": [1, 2, 3],
    "sampling_params": {"max_new_tokens": 4, "ignore_eos": True, "sampling_seed": 5, "n": 2},
}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def spans(*calls: tuple[str, Any, dict[str, str]]) -> list[Any]:
    """The spans of calls to a server."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()

    async def test() -> None:
        async with serving(served_model_name="mine") as server:
            server.app._traces = Traces("mine", exporter)
            for path, body, headers in calls:
                await server.post(path, body, headers=headers)

    run(test)
    return list(exporter.get_finished_spans())


@needs_sdk
def test_a_span_a_request_with_the_conventions_attributes() -> None:
    (span,) = spans(("/generate", BODY, {"x-request-id": "r1"}), ("/get_weight_version", {}, {}))
    assert (span.name, span.kind.name) == ("text_completion mine", "SERVER")
    assert dict(span.attributes) == {
        **dict(span.attributes),
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "slipstream",
        "gen_ai.request.model": "mine",
        "gen_ai.response.model": "mine",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.seed": 5,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/generate",
        "slipstream.request_id": "r1",
        "slipstream.weight_version": 0,
    }
    assert "error.type" not in span.attributes


@needs_sdk
def test_its_events_are_the_phases_of_each_sequence_in_their_order() -> None:
    (span,) = spans(("/generate", BODY, {}))
    by_rid: dict[str, list[Any]] = {}
    for event in span.events:
        by_rid.setdefault(event.attributes["slipstream.rid"], []).append(event)
    assert len(by_rid) == 2
    for events in by_rid.values():
        assert [event.name for event in events] == ["queue", "prefill", "decode"]
        times = [span.start_time, *(event.timestamp for event in events), span.end_time]
        assert times == sorted(times)


@needs_sdk
def test_a_clients_trace_goes_on() -> None:
    chat = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 2}
    with_parent, alone = spans(
        ("/v1/chat/completions", chat, {"traceparent": PARENT}), ("/v1/completions", {}, {})
    )
    assert f"{with_parent.context.trace_id:032x}" in PARENT
    assert f"{with_parent.parent.span_id:016x}" in PARENT
    assert with_parent.name == "chat mine"
    assert "secret" not in with_parent.to_json()
    assert alone.parent is None
    assert alone.attributes["error.type"] == "400"


def test_the_option_is_refused_by_name_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.http.observing.traces.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="slipstream\\[otel\\]") as found:
        check_otel()
    assert found.value.field == "--otel"


@pytest.mark.parametrize(
    "name,value",
    [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
)
def test_an_exporter_that_is_not_served_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr("rollout.http.observing.traces.find_spec", lambda name: name)
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest, match=value) as found:
        check_otel()
    assert found.value.field == "--otel"


@needs_sdk
def test_what_else_a_client_says_of_its_trace_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    odd = {"traceparent": PARENT, "baggage": "secret==;;,k=v", "tracestate": "a=b,,,=;"}
    (span,) = spans(("/generate", BODY, odd))
    assert format(span.parent.span_id, "016x") == "b7ad6b7169203331"
    (other,) = spans(("/generate", BODY, {**odd, "traceparent": "00-zz"}))
    assert other.parent is None
    assert "secret" not in caplog.text
