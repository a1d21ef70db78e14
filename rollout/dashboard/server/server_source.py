"""A server's own figures, for the page."""

from __future__ import annotations

import secrets
import time

from engine.protocol import ReplicaState
from rollout.dashboard.figures import EventsPage, SeriesPage, Snapshot, Tone
from rollout.dashboard.rollouts import RolloutGroup, RolloutPage, RolloutQuery
from rollout.dashboard.server.charts import charts
from rollout.dashboard.server.present import present
from rollout.dashboard.server.sampler import Sampler
from rollout.dashboard.server.timeline import Timeline
from rollout.dashboard.source import UnknownGroup
from rollout.http.services import Services

_NO_ROLLOUTS = (
    "A server keeps no requests. Rollouts are shown by the page of a training run: "
    "python -m rollout view runs/FOLDER"
)
_STATE_AGE_S = 0.5


class ServerSource:
    """The `Source` of a server: samples of its engine, and the events that its engine answered."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._epoch = secrets.token_hex(8)
        self._timeline = Timeline(services.labels.text)
        self._sampler = Sampler(self._state)
        services.engine.listeners.append(self._timeline.note)
        services.engine.on_restart(self._timeline.restarted)

    @property
    def epoch(self) -> str:
        """Another one for each process."""
        return self._epoch

    async def snapshot(self) -> Snapshot:
        """What the engine is and does. Raises EngineDead."""
        services, state = self._services, await self._state()
        word, tone = _word(state)
        return Snapshot(
            title=services.config.model_name,
            kind="server",
            at=time.time(),
            state=word,
            tone=tone,
            model=f"{state.architecture} {state.dtype} on {state.device}".strip(),
            figures=present(state, self._sampler.latest, services.labels.text(state.version)),
            charts=charts(state),
            rollouts=_NO_ROLLOUTS,
            chat="" if services.prompts is None or state.num_labels else services.config.model_name,
        )

    async def series(self, since: int) -> SeriesPage:
        """The samples; being asked for them has more taken."""
        return self._sampler.page(since)

    async def events(self, since: int) -> EventsPage:
        """Versions, pauses and sleeps since the server started."""
        return self._timeline.page(since)

    async def rollouts(self, query: RolloutQuery) -> RolloutPage:
        """None."""
        return RolloutPage(offset=query.offset, total=0, rows=[])

    async def rollout_group(self, group: str) -> RolloutGroup:
        """Raises UnknownGroup."""
        raise UnknownGroup(f"there is no group {group[:100]!r}: {_NO_ROLLOUTS}", field="group")

    async def _state(self) -> ReplicaState:
        return await self._services.engine.state(max_age_s=_STATE_AGE_S)


def _word(state: ReplicaState) -> tuple[str, Tone]:
    """What a server does, and whether that is as it should be."""
    if state.released:
        return f"asleep: {', '.join(state.released)} released", "warn"
    if state.refusal:
        return f"refuses requests: {state.refusal}", "bad"
    if state.open_update is not None:
        return f"receives version {state.open_update}", "warn"
    if state.paused:
        return f"paused ({state.pause_mode})", "warn"
    return "serving", "good"
