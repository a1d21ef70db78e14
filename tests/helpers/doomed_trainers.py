"""Trainers that are killed at a stage of a push: `python -m tests.helpers.doomed_trainers`.

One process imports everything once and forks a trainer for every line that it reads, "TRANSPORT
STAGE MODE URL"; it answers with the signal that ended it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch

from engine.protocol import Command, CommitUpdate, PrepareUpdate, Reply, TensorSpec
from tests.helpers.tiny_models import tiny_hf
from trainer_bridge.adapters.plain import PlainSource
from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.http_target import HttpTarget

TIMEOUT_S = 8.0


class Doomed:
    """A target whose process is killed once a stage is over."""

    def __init__(self, url: str, stage: str) -> None:
        self._target = HttpTarget(url)
        self._stage = stage

    def send(self, command: Command) -> Reply:
        """See `UpdateTarget`."""
        if self._stage == "prepare" and isinstance(command, CommitUpdate):
            self._target.send(PrepareUpdate(version=command.version, owner=command.owner))
            _die()
        reply = self._target.send(command)
        if command.__struct_config__.tag == f"{self._stage}_update":
            _die()
        return reply


class DoomedSource(PlainSource):
    """Killed while its tenth tensor is asked for."""

    lasting = False

    def specs(self) -> list[TensorSpec]:
        return PlainSource(self._model).specs()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for place, item in enumerate(super().tensors()):
            if place == 9:
                _die()
            yield item


def trained() -> Any:
    """The model that every doomed trainer pushes."""
    return tiny_hf("qwen2", seed=50, tie_word_embeddings=True)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _push(transport: str, stage: str, mode: Any, url: str) -> None:
    source = DoomedSource(trained()) if stage == "carry" else PlainSource(trained())
    options = PushOptions(
        transport=transport,  # type: ignore[arg-type]
        bucket_bytes=4096,
        timeout_s=TIMEOUT_S,
        mode=mode,
    )
    Publisher(source, [Doomed(url, stage)], options).push(1)


def main() -> None:
    """Read lines until there are no more."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                _push(*line.split())
            finally:
                os._exit(9)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.WTERMSIG(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
