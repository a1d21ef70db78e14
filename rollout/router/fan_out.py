"""Control calls: to all workers at once, and one answer that says what became of each.

A call that would commit an update is made in two phases: every worker verifies what it has, and
only if all did, they commit. A commit whose answer was lost is asked for again. A worker that has
not the version of the others then is out of rotation, until that version was published to it.

A trainer that speaks with each worker by itself, in two phases of its own, names the worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine.errors import EngineDead, ManifestMismatch, SlipstreamError
from rollout.http.edge import phase
from rollout.http.updates.tracked_update import EndingCall
from rollout.router.config import RouterConfig
from rollout.router.errors import NoWorker
from rollout.router.group_ranks import bodies
from rollout.router.metrics import RouterMetrics
from rollout.router.outcomes import Outcome, together
from rollout.router.wire.messages import ClientRequest, Header, Reply, json_reply
from rollout.router.workers.call import call
from rollout.router.workers.joining import Joining
from rollout.router.workers.registry import Fleet
from rollout.router.workers.worker import Worker

logger = logging.getLogger(__name__)

_CONTROL_S = 1800.0
"""Deadline of a control call; workers end each by their own before."""
_COMMIT_TRIES = 4
_PAUSE_S = 0.1

_LOADING = frozenset(
    {
        *("/update_weights_from_disk", "/update_weights_from_distributed", "/update_weights"),
        "/update_weights_from_tensor",
    }
)
"""Calls that bring weights, and may be all of an update."""
_ENDING = frozenset(
    {
        *("/continue_generation", "/resume", "/resume_memory_occupation", "/wake_up"),
        *("/end_weight_update", "/finish_weight_update"),
    }
)
"""Calls that commit an update that is open."""
_EXPLICIT = frozenset({"/end_weight_update", "/finish_weight_update"})
"""Those of callers that opened it themselves."""
_FLUSHING = frozenset({"/flush_cache", "/reset_prefix_cache"})
_SETTLING = frozenset(
    {
        *("/pause_generation", "/pause", "/sleep", "/begin_weight_update"),
        *("/start_weight_update", "/update_weights_from_disk"),
    }
)
"""These two commit an update that is implicit and whole. One that is not stays open at a flush, and
is dropped by the others."""
_PREPARE, _COMMIT = "/internal/prepare_update", "/internal/commit_update"
_DROP = "/internal/drop_update"
_RENAMING = frozenset({"/update_weight_version", "/command"})
_NAMING_COMMANDS = frozenset({"commit_update", "set_version"})
"""Commands of the protocol after which an engine serves another version than before."""


class _Kind(msgspec.Struct):
    """What a command of the protocol is, whatever else it says."""

    type: str = ""


class FanOut:
    """Makes control calls of all workers that have joined, in rotation or not; not of one that
    serves another model."""

    def __init__(
        self, config: RouterConfig, fleet: Fleet, joining: Joining, metrics: RouterMetrics
    ) -> None:
        self._key = config.worker_admin_api_key or config.worker_api_key
        self._fleet = fleet
        self._joining = joining
        self._metrics = metrics
        self._committing = asyncio.Lock()
        self._folder: dict[str, Any] | None = None
        joining.republish = self._republish

    async def run(self, request: ClientRequest) -> Reply:
        """The answer to one control call. Raises NoWorker, InvalidRequest."""
        workers = [worker for worker in self._fleet if worker.joined and worker.alike]
        if not workers:
            raise NoWorker(
                "no worker has joined, so that nobody takes a control call", field="workers"
            )
        path = request.path
        if path == "/get_world_size":
            total = sum(worker.facts.num_ranks for worker in workers)
            return json_reply(msgspec.json.encode({"world_size": total}))
        refused, dropped = await self._end_gathered(request, workers)
        if refused:
            self._metrics.fanned_out(whole=False)
            return together(path, refused, self._out())
        if path in _LOADING or path in _ENDING:
            async with self._committing:
                outcomes = await self._in_phases(request, workers)
                await self._note_versions(workers)
        else:
            outcomes = await self._all(request, workers)
            if path in _RENAMING and request.method == "POST":
                await self._note_versions(workers, counts=_renames(path, request.body))
        self._metrics.fanned_out(whole=all(outcome.good for outcome in outcomes))
        return together(path, outcomes, self._out(), dropped=dropped)

    async def one(self, request: ClientRequest, worker: Worker, path: str) -> Reply:
        """The answer of one worker, as it gave it, to a control call that names it.

        path: of the call on the worker. Raises EngineDead if it does not answer: whether the call
        took effect is not known.
        """
        query = request.target.decode("latin-1").partition("?")[2]
        target = f"{path}?{query}" if query else path
        headers = self._passed_on(request)
        outcome = await self._one(worker, request.method, target, request.body, headers)
        if request.method == "POST" and worker.joined:
            await self._note_versions([worker], counts=_renames(path, request.body))
        self._metrics.fanned_out(whole=outcome.good)
        if outcome.reply is None:
            raise EngineDead(f"{worker.url} does not answer: {outcome.error}", field="worker")
        return outcome.reply

    async def _in_phases(self, request: ClientRequest, workers: Sequence[Worker]) -> list[Outcome]:
        """What became of a call that may commit."""
        loads = request.path in _LOADING
        first: list[Outcome] = []
        if loads:
            first = await self._all(request, workers, (phase.HEADER.encode(), b"prepare"))
        asked = {"held": loads, "explicit": request.path in _EXPLICIT}
        # Where the call failed, what is open may be another router's.
        verified = await self._each(
            [one.worker for one in first if one.good] if loads else workers, _PREPARE, asked
        )
        versions = {one.worker: _version(one) for one in verified}
        if not all(one.good or one.unknown for one in (*first, *verified)):
            await self._drop(versions)
            return first if any(not one.good for one in first) else verified
        if not loads:
            outcomes = await self._all(request, workers)
            lost = [one.worker for one in outcomes if one.error is not None]
            for worker in lost:
                # The call is idempotent: without an answer it was done, or was not.
                again = await self._all(request, [worker])
                outcomes = [again[0] if one.worker is worker else one for one in outcomes]
            return outcomes
        due = [worker for worker in workers if versions.get(worker) is not None]
        outcomes = await asyncio.gather(*(self._commit(w, versions[w]) for w in due))
        self._note_folder(request, whole=all(one.good for one in outcomes))
        return first if all(one.good for one in outcomes) else outcomes

    async def _end_gathered(
        self, request: ClientRequest, workers: Sequence[Worker]
    ) -> tuple[Sequence[Outcome], str]:
        """Before a call that commits what implicit updates gathered: commit it on all workers, or
        drop it on all where it is whole on some only. (What refuses the call, why one was dropped);
        most often nothing."""
        before = _ends_by(request)
        if before is None or self._committing.locked():
            # What is being committed now is no gathered update any more.
            return [], ""
        async with self._committing:
            verified = await self._each(workers, _PREPARE, {"before": before})
            versions = {one.worker: _version(one) for one in verified}
            short = {one.worker: one for one in verified if _missing(one)}
            due = [worker for worker, version in versions.items() if version is not None]
            if not due:
                return [], ""
            if not short:
                done = await asyncio.gather(*(self._commit(w, versions[w]) for w in due))
                await self._note_versions(workers)
                return ([] if all(one.good for one in done) else done), ""
            error = _not_whole(short)
            await self._drop(versions)
            if before == "pause":
                # Which drops the others, and says so.
                return [], error.message
            await self._drop({worker: _version(one, "gathers") for worker, one in short.items()})
            return [Outcome(worker, error=error) for worker in short], ""

    async def _commit(self, worker: Worker, version: int | None) -> Outcome:
        """Commit on one worker, and again while the answer is lost."""
        for attempt in range(1, _COMMIT_TRIES + 1):
            (outcome,) = await self._each([worker], _COMMIT, {"version": version})
            if outcome.error is None or attempt == _COMMIT_TRIES:
                break
            await asyncio.sleep(_PAUSE_S * attempt)
        return outcome

    async def _drop(self, versions: Mapping[Worker, int | None]) -> None:
        """Abort what is open wherever it was verified: what served before serves on."""
        for worker, version in versions.items():
            if version is not None:
                await self._each([worker], _DROP, {"version": version})

    def _note_folder(self, request: ClientRequest, *, whole: bool) -> None:
        """Keep the folder of a whole update, from which a worker that comes later gets it."""
        self._folder = None
        if request.path == "/update_weights_from_disk" and whole:
            body = msgspec.json.decode(request.body)
            self._folder = None if body.get("partial") else body

    async def _note_versions(self, workers: Sequence[Worker], *, counts: bool = True) -> None:
        """Learn what each serves now. What most of them changed to is the fleet's, if the call that
        was made `counts` as one that changes it; whoever has another is out of rotation."""
        before = {worker: worker.version for worker in workers}
        found = await asyncio.gather(
            *(self._joining.refresh(worker) for worker in workers), return_exceptions=True
        )
        for worker, error in zip(workers, found, strict=True):
            if isinstance(error, SlipstreamError):
                self._joining.doubt(worker)
            elif error is not None:
                raise error
        changed = Counter(w.version for w in workers if w.joined and w.version != before[w])
        if changed and counts:
            self._fleet.version = changed.most_common(1)[0][0]
        # Who joined meanwhile was judged by what the fleet served before.
        for worker in self._fleet:
            if worker.joined:
                self._joining.judge(worker)
        self._fleet.changed()

    async def _republish(self, worker: Worker) -> bool:
        """Give a worker that was held the fleet's weights, from the folder of the last update."""
        if self._folder is None or self._fleet.version is None or not worker.alike:
            return False
        async with self._committing:
            body = {**self._folder, "weight_version": self._fleet.version}
            (outcome,) = await self._each([worker], "/update_weights_from_disk", body)
            if not outcome.good:
                logger.warning("%s does not take the last update: %s", worker.url, outcome.why())
                return False
            await self._joining.refresh(worker)
            return not worker.held

    async def _all(
        self, request: ClientRequest, workers: Sequence[Worker], *more: Header
    ) -> list[Outcome]:
        """The call itself, of each worker at once."""
        headers = self._passed_on(request)
        target = request.target.decode("latin-1")
        sent = bodies(request.path, request.body, workers)
        return await asyncio.gather(
            *(
                self._one(worker, request.method, target, body, [*headers, *more])
                for worker, body in zip(workers, sent, strict=True)
            )
        )

    def _passed_on(self, request: ClientRequest) -> list[Header]:
        """The headers of a client's call that its workers get."""
        names = {b"content-type"} if self._key else {b"content-type", b"authorization"}
        return [pair for pair in request.headers if pair[0] in names]

    async def _each(
        self, workers: Sequence[Worker], target: str, body: dict[str, Any]
    ) -> list[Outcome]:
        """A call of the router's own, of each worker at once."""
        data = msgspec.json.encode(body)
        calls = (self._one(worker, "POST", target, data, []) for worker in workers)
        return await asyncio.gather(*calls)

    async def _one(
        self, worker: Worker, method: str, target: str, body: bytes, headers: Sequence[Header]
    ) -> Outcome:
        worker.num_controls += 1
        try:
            reply = await call(
                worker,
                method,
                target,
                body=body,
                headers=headers,
                key=self._key,
                timeout_s=_CONTROL_S,
            )
        except SlipstreamError as error:
            self._joining.doubt(worker)
            return Outcome(worker, error=error)
        finally:
            worker.num_controls -= 1
            worker.alive()
        return Outcome(worker, reply)

    def _out(self) -> dict[str, str]:
        """Who is out of rotation, and why."""
        return {worker.url: worker.state for worker in self._fleet if not worker.in_rotation}


def _ends_by(request: ClientRequest) -> EndingCall | None:
    """As what a call ends a gathered update; None where it ends none."""
    if request.path in _FLUSHING:
        return "flush"
    if request.path != "/command":
        return "pause" if request.path in _SETTLING else None
    return "pause" if _kind(request.body) in ("pause", "begin_update") else None


def _renames(path: str, body: bytes) -> bool:
    """Whether a call gives what an engine serves another version."""
    if path != "/command":
        return path in _LOADING or path in _ENDING or path in _RENAMING
    return _kind(body) in _NAMING_COMMANDS


def _kind(body: bytes) -> str:
    """What a command is; "" for what is none, whose field the worker names."""
    try:
        return msgspec.json.decode(body, type=_Kind).type
    except msgspec.DecodeError:
        return ""


def _version(outcome: Outcome, name: str = "version") -> int | None:
    body = outcome.body
    found = body.get(name) if outcome.good and isinstance(body, dict) else None
    return found if isinstance(found, int) else None


def _missing(outcome: Outcome) -> str:
    body = outcome.body
    return str(body.get("missing", "")) if outcome.good and isinstance(body, dict) else ""


def _not_whole(short: Mapping[Worker, Outcome]) -> ManifestMismatch:
    told = "; ".join(f"{worker.url}: {_missing(one)}" for worker, one in short.items())
    return ManifestMismatch(
        f"the update is whole on some workers only, and was dropped on all; what served before "
        f"serves ({told}). Send the update again",
        field="update",
    )
