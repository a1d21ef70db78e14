"""The response object, whole and as a stream of events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from engine.errors import SlipstreamError
from engine.protocol import RequestOutput
from rollout.http.chat.turn import Turn
from rollout.http.openai.call import token_writer, usage, version_fields
from rollout.http.openai.responses.bodies import ReasoningConfig, ResponsesBody
from rollout.http.openai.responses.output_items import OutputItems

Keep = Callable[[str, dict[str, Any]], None]
"""What is called with the id and the object of a response that is over and to be stored."""


class ResponseWriter:
    """Writes the one reply of a turn as a response."""

    def __init__(self, turn: Turn, body: ResponsesBody, keep: Keep) -> None:
        self._turn = turn
        self._body = body
        self._keep = keep
        self._call = turn.call
        self._sample = turn.call.samples[0]
        self._output = OutputItems(turn.call.services.identity.draw_id)
        self._writer = token_writer(turn.call, self._sample)
        self._number = 0

    async def reply(self) -> dict[str, Any]:
        """Run to the end."""
        (events,) = await self._turn.finish()
        for _ in self._output.take(events, self._logprobs(self._sample.output)):
            pass
        response: dict[str, Any] = self._finished()[-1]["response"]
        return response

    async def frames(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream, the last of which says how the response ended."""
        for name in ("created", "in_progress"):
            yield self._numbered({"type": f"response.{name}", "response": self._object()})
        try:
            async with aclosing(self._turn.deltas()) as deltas:
                async for found in deltas:
                    logprobs = self._logprobs(found.delta.output)
                    for frame in self._output.take(found.events, logprobs):
                        yield self._numbered(frame)
        except SlipstreamError as error:
            failed = {"code": "server_error", "message": error.message}
            response = self._object(status="failed", error=failed)
            yield self._numbered({"type": "response.failed", "response": response})
            return
        for frame in self._finished():
            yield self._numbered(frame)

    def _finished(self) -> list[dict[str, Any]]:
        """The frames that end a response, of which the last has the whole of it."""
        finish = self._sample.finish
        assert finish is not None, "the turn is over"
        whole = finish.type == "stop"
        more: dict[str, Any] = {"status": "completed", "completed_at": int(time.time())}
        name = "completed"
        if finish.type == "abort":
            name, more = "failed", {"status": "failed"}
            more["error"] = {"code": "server_error", "message": finish.message or "aborted"}
        elif not whole:
            name, more = "incomplete", {"status": "incomplete"}
            more["incomplete_details"] = {"reason": "max_output_tokens"}
        frames = list(self._output.end("completed" if whole else "incomplete"))
        response = self._object(**more, usage=self._usage(), **self._engine_fields())
        if self._body.store:
            self._keep(self._call.call.prefix, response)
        return [*frames, {"type": f"response.{name}", "response": response}]

    def _object(self, **more: Any) -> dict[str, Any]:
        body, reasoning = self._body, self._body.reasoning or ReasoningConfig()
        return {
            "id": self._call.call.prefix,
            "object": "response",
            "created_at": self._call.created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._call.services.config.model_name,
            "output": self._output.items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "store": body.store,
            "background": False,
            "temperature": body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_p": body.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "truncation": "disabled",
            "usage": None,
            "metadata": body.metadata or {},
            **more,
        }

    def _usage(self) -> dict[str, Any]:
        counts = usage(self._call.samples)
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._turn.num_reasoning_tokens()},
            "total_tokens": counts["total_tokens"],
        }

    def _engine_fields(self) -> dict[str, Any]:
        """Which weights sampled it, and its ids where they are asked for."""
        found = version_fields(self._sample, self._call.services.labels)
        if self._body.return_token_ids:
            found["prompt_token_ids"] = self._sample.request.prompt_ids.tolist()
            found["token_ids"] = self._sample.output.token_ids.tolist()
        return found

    def _logprobs(self, output: RequestOutput) -> Sequence[dict[str, Any]]:
        if not self._call.body.logprobs:
            return ()
        count = self._call.num_likeliest(self._body.top_logprobs or 0)
        entries: list[dict[str, Any]] = self._writer.chat(output, count)["content"]
        return entries

    def _numbered(self, frame: dict[str, Any]) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {**frame, "sequence_number": number}


def _format(body: ResponsesBody) -> dict[str, Any]:
    found = None if body.text is None else body.text.format
    return found or {"type": "text"}
