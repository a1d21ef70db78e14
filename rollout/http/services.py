"""What the routes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

from rollout.http.chat.prompts import ChatPrompts
from rollout.http.config import ServeConfig
from rollout.http.edge.access import Access
from rollout.http.engine.client import AsyncEngine
from rollout.http.journal.identity import Drawn, Identity
from rollout.http.native.generator import Generator
from rollout.http.native.sample import Sample
from rollout.http.native.time_limits import TimeLimits
from rollout.http.observing.traces import Traces
from rollout.http.openai.bodies import ChatBody
from rollout.http.updates.lifecycle import Lifecycle
from rollout.http.updates.version_labels import VersionLabels
from rollout.metrics import Metrics
from rollout.parsers.events import Reply
from rollout.requests.seeds import base_seed, derive_seed
from rollout.text.tokenizer import Tokenizer


class NamedCall(Protocol):
    """A call whose client knows its id, and not those of its samples."""

    @property
    def samples(self) -> Sequence[Sample]:
        """Its sequences, each with an id of its own."""
        ...


class Capture(Protocol):
    """Sees a call that is captured, where it is a chat."""

    def conversing(self, body: ChatBody) -> None:
        """The chat is about to be sampled."""
        ...

    def replying(self, reply: Callable[[int], Reply]) -> None:
        """What each sample says, as far as it was read."""
        ...


@dataclass(frozen=True, kw_only=True)
class Services:
    """One server's parts; each route function takes this and nothing global.

    tokenizer, prompts: None for a model that is asked in ids. capture: sees the one call that these
    are for, where it is captured. identity: where calls get their ids.
    calls: those in progress, by the ids that their replies show. traces: where spans of requests
    go, if anywhere.
    """

    config: ServeConfig
    access: Access
    engine: AsyncEngine
    generator: Generator
    lifecycle: Lifecycle
    labels: VersionLabels
    metrics: Metrics
    tokenizer: Tokenizer | None
    prompts: ChatPrompts | None
    capture: Capture | None = None
    identity: Identity = field(default_factory=Drawn)
    calls: WeakValueDictionary[str, NamedCall] = field(default_factory=WeakValueDictionary)
    traces: Traces | None = None


def make_services(
    config: ServeConfig,
    engine: AsyncEngine,
    tokenizer: Tokenizer | None,
    *,
    labels: VersionLabels | None = None,
    metrics: Metrics | None = None,
    front: str = "",
) -> Services:
    """The parts of a server in front of `engine`. front: name of this process, if others share
    the engine: its requests get seeds of their own. labels, metrics: where they are not its own."""
    labels, metrics = labels or VersionLabels(), metrics or Metrics(config.model_name)
    access = Access(config)
    lifecycle = Lifecycle(engine, labels, metrics, keeps_weights=config.engine.memory.cpu_backup)
    engine.guard(access.check)
    engine.on_restart(lambda: lifecycle.reset(weights_lost=bool(engine.no_version)))
    seed = base_seed(config.engine.seed, config.replica_id)
    seed = derive_seed(seed, "front", front) if front else seed
    limits = TimeLimits(default_s=config.request_timeout_s, most_s=config.max_request_timeout_s)
    generator = Generator(engine, tokenizer, metrics, seed=seed, limits=limits)
    return Services(
        config=config,
        access=access,
        engine=engine,
        generator=generator,
        lifecycle=lifecycle,
        labels=labels,
        metrics=metrics,
        tokenizer=tokenizer,
        prompts=None if tokenizer is None else ChatPrompts(generator, tokenizer, config),
        traces=Traces(config.model_name) if config.otel else None,
    )
