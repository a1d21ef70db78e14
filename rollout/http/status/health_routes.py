"""Is it alive, does it answer, may it be sent work; and the metrics."""

from __future__ import annotations

import asyncio

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST

from engine.errors import SlipstreamError
from engine.protocol import GenerateRequest, SamplingParams, Task
from rollout.http.edge.errors import error_response, json_response
from rollout.http.edge.routes import Routes
from rollout.http.native.generate_call import GenerateCall
from rollout.http.services import Services

_PROBE_S = 20.0
_PROBE_SALT = "health probe"


class NotReady(SlipstreamError):
    """The server answers but should not be sent new requests."""

    status = 503


def router(services: Services) -> Routes:
    """Health, readiness and metrics."""
    routes = Routes()
    engine = services.engine

    async def health() -> Response:
        engine.drain.check()
        return await liveness()

    async def liveness() -> Response:
        if engine.dead is not None:
            return error_response(engine.dead)
        if engine.late:
            return error_response(NotReady(f"the engine {engine.late}", field="leader"))
        stalled_s = engine.stalled_s()
        if stalled_s:
            message = f"{engine.num_open} requests wait, and no step was made for {stalled_s:.0f} s"
            return error_response(NotReady(message, field="leader"))
        return json_response({"status": "draining" if engine.drain.began else "ok"})

    async def ready() -> Response:
        engine.drain.check()
        state = await engine.state()
        if state.paused:
            return error_response(NotReady("the server is paused", field="paused"))
        if state.refusal:
            return error_response(NotReady(state.refusal, field="weights"))
        return json_response({"status": "ready"})

    async def health_generate() -> Response:
        state = await engine.state()
        if not (state.paused or state.refusal or state.open_update is not None):
            await _probe(services)
        return json_response({"status": "ok"})

    async def metrics() -> Response:
        body = services.metrics.render(await engine.state())
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    for path, handler in {
        "/health": health,
        "/ping": health,
        "/liveness": liveness,
        "/ready": ready,
        "/health_generate": health_generate,
        "/metrics": metrics,
    }.items():
        routes.add_api_route(path, handler, methods=["GET"])
    return routes


async def _probe(services: Services) -> None:
    """One token of a one-token prompt, or its score, within `_PROBE_S`."""
    item = GenerateRequest(
        input_ids=[0],
        sampling_params=SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True),
        cache_salt=_PROBE_SALT,
    )
    task: Task = "classify" if services.engine.facts.num_labels else "generate"
    call = GenerateCall(items=[item], batch=False, stream=False, task=task)
    samples = await services.generator.samples(call)
    try:
        await asyncio.wait_for(services.generator.finish(samples), _PROBE_S)
    except TimeoutError as error:
        message = f"the engine gave no answer within {_PROBE_S:g} s"
        raise NotReady(message, field="probe") from error
