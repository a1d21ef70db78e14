"""What became of a control call on each worker, and one answer of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.errors import SlipstreamError
from rollout.http.edge.errors import error_body
from rollout.router.errors import FanOutFailed
from rollout.router.wire.messages import Reply, json_reply
from rollout.router.workers.worker import Worker


@dataclass(frozen=True)
class Outcome:
    """What one worker answered, or why it did not."""

    worker: Worker
    reply: Reply | None = None
    error: SlipstreamError | None = None

    @property
    def good(self) -> bool:
        """Whether it took the call."""
        return self.reply is not None and self.reply.status == 200

    @property
    def unknown(self) -> bool:
        """Whether the worker has no such route, as a server that is not ours."""
        return self.reply is not None and self.reply.status == 404

    @property
    def body(self) -> Any:
        """What it answered: JSON as objects, else text; None without an answer."""
        if self.reply is None or not self.reply.body:
            return None
        try:
            return msgspec.json.decode(self.reply.body)
        except msgspec.DecodeError:
            return self.reply.body.decode(errors="replace")

    def told(self) -> dict[str, Any]:
        """The outcome as an object."""
        if self.reply is None:
            assert self.error is not None
            return {"success": False, "status": None, **error_body(self.error)}
        return {"success": self.good, "status": self.reply.status, "reply": self.body}

    def why(self) -> str:
        """Why it did not take the call."""
        body = error_body(self.error) if self.error is not None else self.body
        error = body.get("error") if isinstance(body, dict) else None
        return str(error.get("message", error) if isinstance(error, dict) else body)[:1000]


def together(
    path: str, outcomes: Sequence[Outcome], out: Mapping[str, str], *, dropped: str = ""
) -> Reply:
    """One answer of all: the first worker's, with what each said below `workers`, or an error that
    names all that did not take it. out: who is out of rotation, and why. dropped: why an update."""
    more: dict[str, Any] = {"workers": {one.worker.url: one.told() for one in outcomes}}
    more |= {"dropped": dropped} if dropped else {}
    more |= {"out_of_rotation": dict(out)} if out else {}
    if all(outcome.good for outcome in outcomes):
        found = outcomes[0].body
        if not isinstance(found, dict):
            assert outcomes[0].reply is not None
            return outcomes[0].reply
        return json_reply(msgspec.json.encode({**found, **more}))
    return _failed(path, outcomes, more)


def _failed(path: str, outcomes: Sequence[Outcome], more: Mapping[str, Any]) -> Reply:
    """The error of a call that some of the workers did not take. Where all gave the same status, so
    does it."""
    bad = [outcome for outcome in outcomes if not outcome.good]
    names = ", ".join(outcome.worker.url for outcome in bad)
    why = "; ".join(f"{outcome.worker.url}: {outcome.why()}" for outcome in bad)
    error = FanOutFailed(
        f"{path} failed on {names} ({len(bad)} of {len(outcomes)} workers): {why}",
        field=bad[0].worker.url,
    )
    statuses = {one.reply.status if one.reply is not None else None for one in outcomes}
    status = statuses.pop() if len(statuses) == 1 else None
    body = {"success": False, "message": error.message, **error_body(error), **more}
    return json_reply(msgspec.json.encode(body), status or error.status)
