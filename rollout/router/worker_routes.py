"""Registration, in the words of sglang-router: its JSON API below /workers, and the older calls.

Names of fields and statuses are those of `WorkerInfo`, `WorkerListResponse` and the handlers of
sgl-project/sglang's model gateway (sgl-model-gateway, Apache-2.0), read in its sources.
"""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import parse_qs, unquote

import msgspec
from msgspec import Meta

from engine.errors import InvalidRequest, UnsupportedOption
from rollout.requests.json_types import decode_json
from rollout.router.errors import UnknownWorker
from rollout.router.wire.messages import ClientRequest, Reply, json_reply
from rollout.router.workers.joining import Joining
from rollout.router.workers.registry import Fleet
from rollout.router.workers.worker import Worker

_PRIORITY, _COST = 50, 1.0


class _NewWorker(msgspec.Struct, kw_only=True):
    """POST /workers. Other fields of the gateway (priority, cost, labels) are passed over."""

    url: Annotated[str, Meta(max_length=2048)]
    worker_type: str | None = None
    bootstrap_port: int | None = None


class WorkerRoutes:
    """The routes of the fleet's members."""

    def __init__(self, fleet: Fleet, joining: Joining) -> None:
        self._fleet = fleet
        self._joining = joining

    def handle(self, request: ClientRequest) -> Reply:
        """The reply to a call of these routes. Raises InvalidRequest, UnsupportedOption,
        UnknownWorker."""
        path, method = request.path.rstrip("/"), request.method
        if path == "/workers" and method == "GET":
            return self._reply(self._list())
        if path == "/workers" and method == "POST":
            return self._create(request)
        if path.startswith("/workers/") and method in ("GET", "DELETE"):
            worker = self._fleet.find(unquote(path.removeprefix("/workers/")))
            return self._reply(_told(worker)) if method == "GET" else self._remove(worker)
        if path == "/list_workers":
            return self._reply({"urls": [worker.url for worker in self._fleet]})
        if path in ("/add_worker", "/remove_worker") and method == "POST":
            return self._old_call(path, request)
        raise UnknownWorker(f"{path} has no {method}", field="path")

    def _create(self, request: ClientRequest) -> Reply:
        body = decode_json(request.body, _NewWorker)
        if body.worker_type not in (None, "", "regular"):
            raise UnsupportedOption(
                f"worker_type is {body.worker_type[:100]!r}; this router has regular workers only",
                field="worker_type",
            )
        worker = self._add(body.url)
        told = {
            "status": "accepted",
            "worker_id": worker.id,
            "url": worker.url,
            "location": f"/workers/{worker.id}",
            "message": "the worker joins once it answers",
        }
        reply = self._reply(told, 202)
        reply.headers.append((b"location", f"/workers/{worker.id}".encode()))
        return reply

    def _add(self, url: str) -> Worker:
        worker, new = self._fleet.add(url)
        if not new:
            # Who registers again may be another process.
            self._joining.doubt(worker)
        self._joining.look(worker)
        return worker

    def _remove(self, worker: Worker) -> Reply:
        worker.draining = True
        self._fleet.touch()
        if not worker.num_open:
            self._fleet.drop(worker)
        told = {"status": "accepted", "worker_id": worker.id, "message": f"{worker.url} drains"}
        return self._reply(told, 202)

    def _old_call(self, path: str, request: ClientRequest) -> Reply:
        query = parse_qs(request.target.partition(b"?")[2].decode("latin-1"))
        urls = query.get("url") or query.get("worker_url")
        if not urls and request.body:
            fields = decode_json(request.body, dict[str, Any])
            urls = [str(fields.get("url") or fields.get("worker_url") or "")]
        if not urls or not urls[0]:
            raise InvalidRequest("give the worker as ?url=http://HOST:PORT", field="url")
        if path == "/add_worker":
            text = f"Successfully added worker: {self._add(urls[0]).url}"
        else:
            worker = self._fleet.find(urls[0])
            self._remove(worker)
            text = f"Successfully removed worker: {worker.url}"
        return Reply(200, [(b"content-type", b"text/plain; charset=utf-8")], text.encode())

    def _list(self) -> dict[str, Any]:
        workers = list(self._fleet)
        return {
            "workers": [_told(worker) for worker in workers],
            "total": len(workers),
            "stats": {
                "total_workers": len(workers),
                "healthy_workers": sum(worker.in_rotation for worker in workers),
                "total_models": len({w.facts.model for w in workers if w.joined}),
                "total_load": sum(worker.num_open for worker in workers),
                "by_type": {"regular": len(workers), "prefill": 0, "decode": 0},
            },
        }

    def _reply(self, value: Any, status: int = 200) -> Reply:
        return json_reply(msgspec.json.encode(value), status)


def _told(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.id,
        "url": worker.url,
        "model_id": worker.facts.model or "unknown",
        "priority": _PRIORITY,
        "cost": _COST,
        "worker_type": "regular",
        "is_healthy": worker.in_rotation,
        "load": worker.num_open,
        "connection_mode": "http",
        "metadata": {
            "weight_version": worker.version,
            "state": worker.state,
            "takes_weights": worker.takes_weights,
        },
    }
