"""The engine lives in this process: it reads the trainer's own tensors.

No bucket and no copy on the way: the update is verified against the tensors as they are, and
each is copied once, straight into its place in the engine.
"""

from __future__ import annotations

import torch

from engine.protocol import BeginUpdate, UpdateReport
from trainer_bridge.control import UpdateTarget


def send(
    begin: BeginUpdate, tensors: list[tuple[str, torch.Tensor]], target: UpdateTarget
) -> UpdateReport:
    """Publish `tensors`; they must not change until this returns."""
    return target.update_weights_inproc(begin, tensors)
