"""The leader's handle on one further rank: its process, its channel and its log."""

from __future__ import annotations

import os
import subprocess
import time
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from engine.config import ParallelConfig
from engine.errors import EngineDead, by_name
from engine.protocol import Reply, StepResult
from engine.protocol.deadlines import RES_OPTIONS
from rollout.ranks.results import RankResult
from rollout.replica.ipc import Channel
from rollout.replica.python_child import child_command, child_environment

_POLL_S = 0.1
_SEND_S = 30.0
_LOG_TAIL = 2000


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """Where the ranks of one replica find what they share; all in `folder`."""

    folder: Path

    @property
    def config(self) -> Path:
        """The `EngineConfig`, as JSON."""
        return self.folder / "ranks.json"

    @property
    def board(self) -> Path:
        """The file of `StepBoard`."""
        return self.folder / "steps"

    @property
    def meeting_place(self) -> Path:
        """The file that the process group forms at."""
        return self.folder / "meeting"


class RankProcess:
    """One spawned rank. Frames reach it in order; it answers every command, no step, those that
    run beside steps when they have ended.

    Raises EngineDead, naming the rank, from any call that needs a rank which is gone.
    """

    def __init__(self, rank: int, parallel: ParallelConfig, files: RankFiles, factory: str) -> None:
        self.rank = rank
        self.name = parallel.rank_name(rank)
        self._log = files.folder / f"rank-{rank}.log"
        endpoint = f"ipc://{files.folder}/rank-{rank}"
        self._channel = Channel.listen(endpoint, Reply)
        self._replies: dict[int, deque[Reply]] = {}
        self._results: Channel | None = None
        if rank % parallel.tp_size == 0:
            self._results = Channel.listen(results_endpoint(endpoint), RankResult)
        arguments = [endpoint, str(files.folder), factory, str(rank), str(os.getpid())]
        # Ranks that all start a thread a core stall each other.
        threads = max(1, (os.cpu_count() or 1) // parallel.num_ranks)
        # A Ctrl-C here is not one there; a spawned leader has none, and whoever ends it ends its
        # ranks with it, as one process group.
        with self._log.open("a+b") as log:
            self._process = subprocess.Popen(
                child_command("rollout.ranks.rank_main", *arguments),
                env=child_environment(OMP_NUM_THREADS=str(threads), RES_OPTIONS=RES_OPTIONS),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=not _is_session_leader(),
            )
        # Also runs at exit, for a replica that nobody closed.
        self._end = weakref.finalize(self, _end, self._process)

    def post(self, frame: bytes) -> None:
        """Send the frame of some commands or one step."""
        deadline = time.monotonic() + _SEND_S
        while not self._channel.can_send(timeout_s=_POLL_S):
            if exit_text := self.exit_text():
                raise self.error(exit_text)
            if time.monotonic() > deadline:
                raise self.error(f"took no message within {_SEND_S:g} s")
        self._channel.send_frame(frame, timeout_s=_POLL_S)

    def reply(self, timeout_s: float, what: str, call: int = 0) -> Reply:
        """The answer to the command sent as `call`; 0: what the rank says by itself."""
        deadline = time.monotonic() + timeout_s
        while True:
            # Asked before receiving: what a dying rank sent last is still delivered.
            exit_text = self.exit_text()
            self._receive(0.0 if exit_text else _POLL_S)
            if found := self._replies.get(call):
                return found.popleft()
            if exit_text:
                raise self.error(exit_text)
            if time.monotonic() > deadline:
                raise self.error(f"did not answer '{what}' within {timeout_s:g} s")

    def poll(self, call: int) -> Reply | None:
        """The same, if it has come."""
        exit_text = self.exit_text()
        self._receive(0.0)
        if found := self._replies.get(call):
            return found.popleft()
        if exit_text:
            raise self.error(exit_text)
        return None

    @property
    def samples(self) -> bool:
        """Whether it returns what its copy of the model samples."""
        return self._results is not None

    def result(self, step: int) -> StepResult:
        """What its copy sampled in a step; results come in the order of steps. Waits as long as the
        rank lives, so whoever calls this has it ended in time. Raises the error of a step that
        failed there."""
        assert self._results is not None, f"{self.name} returns no results"
        while True:
            exit_text = self.exit_text()
            found: list[RankResult] = self._results.receive(timeout_s=0.0 if exit_text else _POLL_S)
            # Steps before it that nobody waited for had failed elsewhere.
            for answer in (each for each in found if each.step == step):
                if answer.error is not None:
                    error = answer.error
                    raise by_name(error.kind, f"{self.name}: {error.message}", error.field)
                assert answer.result is not None, "neither a result nor an error"
                return answer.result
            if exit_text and not found:
                raise self.error(exit_text)

    def _receive(self, timeout_s: float) -> None:
        """Sort what has come, or comes in time: a rank answers some commands out of order."""
        self._replies = {call: found for call, found in self._replies.items() if found}
        if any(self._replies.values()):
            timeout_s = 0.0
        while messages := self._channel.receive(timeout_s=timeout_s):
            for reply in messages:
                self._replies.setdefault(reply.id, deque()).append(reply)
            timeout_s = 0.0

    def exit_text(self) -> str:
        """How the process ended; empty while it runs. Callable from any thread."""
        code = self._process.poll()
        if code is None:
            return ""
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    def error(self, why: str) -> EngineDead:
        """What to raise about this rank, with the end of its log."""
        tail = self._log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
        message = f"{self.name} (process {self._process.pid}) {why}"
        return EngineDead(f"{message}\n{tail}" if tail else message, field=f"rank {self.rank}")

    def kill(self) -> None:
        """End the process now. Callable from any thread, idempotent."""
        self._end()

    def close(self, leave_s: float) -> None:
        """Give a rank that was told to leave `leave_s` to do so, then kill it."""
        try:
            self._process.wait(leave_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()
            self._channel.close()
            if self._results is not None:
                self._results.close()


def results_endpoint(endpoint: str) -> str:
    """Where a rank sends what its copy of the model samples, given where it takes commands."""
    return f"{endpoint}-results"


def _is_session_leader() -> bool:
    return os.getsid(0) == os.getpid()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
