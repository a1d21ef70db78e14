"""The engine of `benchmarks/router_kills.py`: the real one, which says in a file what it samples.

A file outlives kill -9: one record for each sequence that enters a row, (seed, known tokens), and
one for each token that a row samples, with the time.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.executor import build_executor
from engine.protocol import StepPlan

LOGS = "ROUTER_KILLS_LOGS"
"""Environment: the folder of the files."""
RECORD = struct.Struct("<qid")
"""Seed, tokens known before, time; a row that samples has -1 - known."""


class TellingExecutor:
    """An executor that notes plans; everything else is the real one's."""

    def __init__(self, real: Any) -> None:
        self._real = real
        path = Path(os.environ[LOGS]) / str(os.getpid())
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._rows: dict[int, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def execute(self, plan: StepPlan) -> Any:
        """See `Executor`."""
        self._note(plan)
        return self._real.execute(plan)

    def launch(self, plan: StepPlan) -> Any:
        """See `Executor`."""
        self._note(plan)
        return self._real.launch(plan)

    def _note(self, plan: StepPlan) -> None:
        now, found = time.time(), []
        for new in plan.new_rows:
            self._rows[new.slot] = [new.sampling.seed, len(new.token_ids)]
            found.append(RECORD.pack(new.sampling.seed, len(new.token_ids), now))
        for slot in np.asarray(plan.slots)[np.asarray(plan.samples)].tolist():
            row = self._rows[slot]
            found.append(RECORD.pack(row[0], -1 - row[1], now))
            row[1] += 1
        os.write(self._file, b"".join(found))


def build(config: EngineConfig, **options: Any) -> Any:
    """The factory that a leader is given by name."""
    return TellingExecutor(build_executor(config, **options))
