"""The few calls a bridge makes on whatever serves the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

import torch

from engine.errors import SlipstreamError
from engine.protocol import BeginUpdate, Command, GetState, ReplicaState, Reply, UpdateReport

logger = logging.getLogger(__name__)


class UpdateTarget(Protocol):
    """An engine that takes weight updates: a `rollout.replica`, or an `HttpTarget`."""

    def send(self, command: Command) -> Reply:
        """Run one control command; raises the typed error of a refusal."""
        ...


class LocalTarget(UpdateTarget, Protocol):
    """An engine that can also read this process's memory."""

    def update_weights_inproc(
        self,
        begin: BeginUpdate,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        lasting: bool = False,
    ) -> UpdateReport:
        """One whole update from tensors of this process. lasting: they stay as they are until
        this returns; else each is read before the next is asked for."""
        ...


def state_of(target: UpdateTarget) -> ReplicaState:
    """What the engine is and serves."""
    state = target.send(GetState()).state
    assert state is not None, "GetState must answer with a state"
    return state


def try_send(target: UpdateTarget, command: Command) -> None:
    """Send on the way out of a failure: a second error is logged, the first one is raised."""
    try:
        target.send(command)
    except SlipstreamError as error:
        logger.warning("%s failed as well: %s", type(command).__name__, error)
