"""The engine lives in this process: it reads the trainer's own tensors.

No bucket and no copy on the way. A source whose tensors last lends them: the update is verified
against them as they are, and each is copied once, straight into its place in the engine. Those
of any other source, such as one that gathers shards, are taken in as they come, each before the
next is asked for: into the shadow of the update, or into their places where there is no memory
for one.
"""

from __future__ import annotations

from engine.protocol import BeginUpdate, UpdateReport
from trainer_bridge.adapters.base import WeightSource
from trainer_bridge.fleet import draw_owner, owned
from trainer_bridge.update_target import LocalTarget


def send(begin: BeginUpdate, source: WeightSource, target: LocalTarget) -> UpdateReport:
    """Publish the tensors of `source`; those of a lasting one must not change until this
    returns."""
    begin = owned(begin, draw_owner())
    return target.update_weights_inproc(begin, source.tensors(), lasting=source.lasting)
