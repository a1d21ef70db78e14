"""The engine lives in this process: it reads the trainer's own tensors.

No bucket and no copy on the way: the update is verified against the tensors as they are, and
each is copied once, straight into its place in the engine. Tensors that a sharded trainer
gathers a few at a time cannot be held until the commit; they are placed as they come.
"""

from __future__ import annotations

from msgspec.structs import replace

from engine.protocol import BeginUpdate, UpdateReport
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.control import LocalTarget


def send(begin: BeginUpdate, source: WeightSource, target: LocalTarget) -> UpdateReport:
    """Publish the tensors of `source`; they must not change until this returns."""
    if not source.is_resident:
        begin = replace(begin, mode="in_place")
    return target.update_weights_inproc(begin, source.tensors())
