"""Spans of OpenTelemetry, one a request, with the attributes of its conventions for generative AI.

`--otel` needs the extra `otel`. Where spans go is said by the standard variables of the environment
(`OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`, ...): OpenTelemetry's
"Environment Variable Specification" and "Semantic conventions for generative client and server
operations". A span is made when its request has ended, from the times that were noted meanwhile, so
that a step of the request pays for nothing. Prompts and outputs are in none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from starlette.types import Scope

from engine.errors import InvalidRequest
from rollout.http.native.sample import Sample
from rollout.http.observing.call_notes import CallNotes

_OPERATIONS: Mapping[str, str] = MappingProxyType(
    {
        "/generate": "text_completion",
        "/v1/completions": "text_completion",
        "/inference/v1/generate": "text_completion",
        "/v1/chat/completions": "chat",
        "/v1/responses": "chat",
        "/v1/messages": "chat",
        "/v1/embeddings": "embeddings",
    }
)
"""`gen_ai.operation.name` by path."""
_MOST_SAMPLES = 16
"""Sequences of one request whose phases are events."""
_BAGGAGE = b"baggage"
"""A header that no span needs, and of which OpenTelemetry logs, as it came, what it cannot read."""
_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def check_otel() -> None:
    """Raise InvalidRequest (`--otel`) where the extra is not installed, or the environment asks for
    an exporter that is not served."""
    try:
        missing = [name for name in _NEEDED if find_spec(name) is None]
    except ModuleNotFoundError as error:
        missing = [str(error.name)]
    if missing:
        raise InvalidRequest(
            f"needs {missing[0]}: pip install 'slipstream[otel]', or leave it out", field="--otel"
        )
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    if exporter not in ("otlp", "console", "none"):
        why = f"OTEL_TRACES_EXPORTER is {exporter!r}; served are otlp, console and none"
        raise InvalidRequest(why, field="--otel")
    if exporter == "otlp" and protocol != "http/protobuf":
        why = f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; served is http/protobuf"
        raise InvalidRequest(why, field="--otel")


class Traces:
    """Where the spans of one server go. model_name: as requests call it. exporter: a span exporter
    of OpenTelemetry in place of the environment's, whose spans are exported one by one."""

    def __init__(self, model_name: str, exporter: Any = None) -> None:
        from opentelemetry import propagate
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "slipstream"}
        self._provider = TracerProvider(resource=Resource.create(named))
        own = exporter is None
        exporter = _exporter() if own else exporter
        if exporter is not None:
            made = BatchSpanProcessor(exporter) if own else SimpleSpanProcessor(exporter)
            self._provider.add_span_processor(made)
        self._tracer = self._provider.get_tracer("slipstream")
        self._extract = propagate.extract
        self._model_name = model_name

    def ended(self, notes: CallNotes, scope: Scope) -> None:
        """A request has ended: make its span, a child of the client's if it sent `traceparent`. Of
        routes that sample nothing there is none."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        operation = _OPERATIONS.get(notes.path)
        if operation is None:
            return
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name != _BAGGAGE
        }
        span = self._tracer.start_span(
            f"{operation} {self._model_name}",
            context=self._extract(carrier),
            kind=SpanKind.SERVER,
            start_time=notes.began_ns,
            attributes=_attributes(notes, operation, self._model_name),
        )
        for sample in notes.samples[:_MOST_SAMPLES]:
            _add_phases(span, notes, sample)
        if notes.status >= 400 or not notes.status:
            span.set_attribute("error.type", str(notes.status or "cancelled"))
        if notes.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(notes.began_ns + _nanoseconds(time.monotonic() - notes.began))

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()


def _exporter() -> Any:
    """The exporter that the environment asks for; None for none."""
    name = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if name == "none":
        return None
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _attributes(notes: CallNotes, operation: str, model_name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "slipstream",
        "gen_ai.request.model": model_name,
        "http.request.method": notes.method,
        "http.response.status_code": notes.status,
        "url.path": notes.path,
        "slipstream.request_id": notes.request_id,
    }
    if notes.samples:
        found |= _of_samples(notes, model_name)
    return found


def _of_samples(notes: CallNotes, model_name: str) -> dict[str, Any]:
    samples, sampling = notes.samples, notes.samples[0].request.sampling
    ended = [sample for sample in samples if sample.finish is not None]
    prompts = {id(sample.wire): len(sample.request.prompt_ids) for sample in samples}
    found: dict[str, Any] = {
        "gen_ai.response.model": model_name,
        "gen_ai.request.choice.count": len(samples),
        "gen_ai.request.max_tokens": sampling.max_new_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.usage.input_tokens": sum(prompts.values()),
        "gen_ai.usage.output_tokens": sum(sample.num_sent for sample in samples),
        "gen_ai.response.finish_reasons": [s.finish.type for s in ended if s.finish is not None],
    }
    if sampling.top_k > 0:
        found["gen_ai.request.top_k"] = sampling.top_k
    if sampling.sampling_seed is not None:
        found["gen_ai.request.seed"] = sampling.sampling_seed
    versions = [sample.output.spans[-1].version for sample in ended if sample.output.spans]
    if versions:
        found["slipstream.weight_version"] = max(versions)
    return found


def _add_phases(span: Any, notes: CallNotes, sample: Sample) -> None:
    """Events where a sequence began to wait, to be prefilled and to be decoded."""

    def at(moment: float) -> int:
        return notes.began_ns + _nanoseconds(moment - notes.began)

    told = {"slipstream.rid": sample.request.rid}
    span.add_event("queue", told, timestamp=at(sample.started_at))
    if sample.finish is not None and sample.output.queue_s:
        span.add_event("prefill", told, timestamp=at(sample.started_at + sample.output.queue_s))
    if sample.first_at:
        span.add_event("decode", told, timestamp=at(sample.first_at))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
