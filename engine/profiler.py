"""Traces of what one rank does, by torch's profiler: started and stopped by command, or counted
in steps."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from engine.errors import InvalidRequest, ProfileOrder
from engine.protocol import ProfileActivity, StartProfile

logger = logging.getLogger(__name__)


class RankProfiler:
    """At most one profile at a time. Every call comes from the thread that runs the steps, which
    is the thread whose operations torch records."""

    def __init__(self, device: torch.device, rank: int) -> None:
        self._device = device
        self._rank = rank
        self._command: StartProfile | None = None
        self._running: profile | None = None
        self._num_left: int | None = None
        self._ended = ""

    def start(self, command: StartProfile) -> None:
        """Record from now on, or from step `start_step`. Raises ProfileOrder if a profile was
        started before, InvalidRequest for a folder that cannot be made or an activity that this
        device does not have."""
        if self._command is not None:
            raise ProfileOrder(
                "a profile was started already; stop it first (/stop_profile)", field="profile"
            )
        if "gpu" in command.activities and self._device.type != "cuda":
            raise InvalidRequest("this engine has no GPU to profile", field="activities")
        try:
            Path(command.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(
                f"{command.folder} cannot be made: {error}", field="folder"
            ) from error
        self._command, self._num_left = command, command.num_steps
        if command.start_step is None:
            self._begin(command)

    def stop(self) -> str:
        """End the profile and write its trace; the file's path. Raises ProfileOrder if none was
        started, or the one that was has ended by itself."""
        if self._command is None:
            last = f"; the last one ended by itself: {self._ended}" if self._ended else ""
            raise ProfileOrder(f"no profile is in progress{last}", field="profile")
        self._ended = ""
        return self._end()

    def before(self, step: int) -> None:
        """The step with this number comes next."""
        command = self._command
        if command is None or self._running is not None:
            return
        if command.start_step is not None and step >= command.start_step:
            self._begin(command)

    def after(self) -> None:
        """A step was launched; the last of `num_steps` ends the profile."""
        if self._running is None or self._num_left is None:
            return
        self._num_left -= 1
        if self._num_left > 0:
            return
        try:
            self._ended = self._end()
            logger.info("profile in %s", self._ended)
        except (OSError, RuntimeError) as error:
            # A trace that cannot be written costs no request its step.
            self._ended = f"no trace was written: {error}"
            logger.exception("the profile is lost")

    def _begin(self, command: StartProfile) -> None:
        self._running = profile(
            activities=[_ACTIVITIES[name] for name in command.activities or self._all()],
            with_stack=command.with_stack,
            record_shapes=command.record_shapes,
            acc_events=True,
        )
        self._running.start()

    def _end(self) -> str:
        command, running = self._command, self._running
        assert command is not None, "no profile to end"
        self._command = self._running = None
        path = Path(command.folder) / f"{command.name or 'profile'}-TP-{self._rank}.trace.json.gz"
        if running is None:
            raise ProfileOrder(
                f"step {command.start_step} did not come, so nothing was recorded", field="profile"
            )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        running.stop()
        running.export_chrome_trace(str(path))
        return str(path)

    def _all(self) -> list[ProfileActivity]:
        return ["cpu", "gpu"] if self._device.type == "cuda" else ["cpu"]


_ACTIVITIES = {"cpu": ProfilerActivity.CPU, "gpu": ProfilerActivity.CUDA}
