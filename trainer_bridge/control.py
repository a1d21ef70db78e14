"""The few calls a bridge makes on whatever serves the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from engine.protocol import BeginUpdate, Control, Reply, UpdateReport


class UpdateTarget(Protocol):
    """An engine that takes weight updates; `rollout.replica` provides two."""

    def send(self, command: Control) -> Reply:
        """Run one control command; raises the typed error of a refusal."""
        ...

    def update_weights_inproc(
        self, begin: BeginUpdate, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> UpdateReport:
        """One whole update from tensors of this process."""
        ...
