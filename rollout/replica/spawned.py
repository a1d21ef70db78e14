"""A replica in a spawned process: the same leader, behind a ZMQ channel."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineDead, InvalidRequest, SlipstreamError, UnsupportedOption
from engine.protocol import (
    BeginUpdate,
    Call,
    Command,
    GetState,
    ReplicaState,
    Reply,
    Request,
    RequestOutput,
    Shutdown,
    TokenRows,
    UpdateReport,
)
from engine.protocol.deadlines import REPLY_S, RES_OPTIONS, SILENT_S, START_S
from rollout.logs.stack_dump import StackDump
from rollout.replica.columns import from_columns
from rollout.replica.command_replies import command_name, reply_deadline_s, unless_refused
from rollout.replica.ipc import Channel, encode_frame
from rollout.replica.process_log import cause_of_death, log_tail
from rollout.replica.pulse import PulseWatch, pulse_path
from rollout.replica.python_child import child_command, child_environment
from rollout.requests.message_ranges import check_ranges
from rollout.requests.outputs import refused

_POLL_S = 0.1
_LOOK_S = 0.5
"""Between looks at the leader's signs of life."""
_LEAVE_S = 15.0
_SHOWN_LOG = 2000
# The channel has no limit, so that only a leader that is gone takes nothing.
_POST_S = 1.0


class ProcessReplica:
    """Spawns the leader and talks to it; `step` only collects, the leader steps by itself.

    factory: "module:function" that builds the executor in the leader's process.
    start_s: deadline for loading the model. reply_s: deadline for the leader to answer; a
    weight command gets `start_s`. A leader that misses one, or shows by its pulse that it hangs,
    is killed, and every later call raises the same EngineDead. wait: return once the model is
    loaded; else at once, and the first reply that `collect` gives, of id 0, says that the engine
    is ready, or why it cannot be built. shared: front processes may join it at `hub`. stuck_s: what
    the leader takes longer for has the stacks of all its processes logged; 0.0 for never.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        factory: str = "engine.executor:build_executor",
        start_s: float = START_S,
        reply_s: float = REPLY_S,
        wait: bool = True,
        shared: bool = False,
        stuck_s: float = 0.0,
    ) -> None:
        self._start_s = start_s
        self._reply_s = reply_s
        self._open: set[str] = set()
        self._outputs: list[RequestOutput] = []
        self._replies: dict[int, Reply] = {}
        self._last_id = 0
        self._dead: EngineDead | None = None
        self._closed = False
        self._ready = False
        self._folder = _own_folder()
        self._pulse = PulseWatch(pulse_path(self._folder), silent_s=min(SILENT_S, reply_s))
        self._stacks = StackDump(self._folder)
        self._stuck_s = stuck_s
        self._look_at = 0.0
        self.hub = f"ipc://{self._folder}/hub" if shared else ""
        endpoint = f"ipc://{self._folder}/leader"
        self._channel = Channel.listen(endpoint, RequestOutput | TokenRows | Reply)
        self._process = self._spawn(config, endpoint, factory)
        # Also runs at exit, for a replica that nobody closed.
        self._remove = weakref.finalize(self, _remove, self._process, self._folder)
        self._heard_at = time.monotonic()
        if not wait:
            return
        try:
            self._await_reply(0, start_s, "start")
        except SlipstreamError:
            self.close()
            raise

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; refusals come back from `step`."""
        good: list[Request] = []
        for request in requests:
            try:
                check_ranges(request)
                good.append(request)
            except InvalidRequest as error:
                self._outputs.append(refused(request, error))
        self._send(good)
        self._open.update(request.rid for request in good)

    def step(self) -> list[RequestOutput]:
        """Outputs that arrived; waits a moment for the first. Raises EngineDead."""
        if not self._outputs:
            self._receive(_POLL_S)
        if self._open and time.monotonic() - self._heard_at > self._reply_s:
            self.state()
        outputs, self._outputs = self._outputs, []
        self._open.difference_update(o.rid for o in outputs if o.finish is not None)
        return outputs

    def send(self, command: Command) -> Reply:
        """Run a control command and wait for its answer. Raises its typed error."""
        check_ranges(command)
        self._last_id += 1
        self._send([Call(id=self._last_id, command=command)])
        deadline_s = reply_deadline_s(command, reply_s=self._reply_s, slow_s=self._start_s)
        return self._await_reply(self._last_id, deadline_s, command_name(command))

    def post_frame(self, frame: bytes) -> None:
        """Send messages, in the frame that `ipc.frame_of` made, and return at once; what comes of
        them is read by `collect`. For a caller with an event loop, in place of the calls above."""
        self._send_frame(frame, timeout_s=_POST_S)

    def collect(self) -> list[RequestOutput | Reply]:
        """The next messages that have arrived, in order; a reply carries its call's id. Does
        not wait: empty when nothing is left. Raises EngineDead."""
        return self._take(0.0)

    def fileno(self) -> int:
        """A descriptor to watch before `collect`; see `Channel.fileno`."""
        return self._channel.fileno()

    def fail(self, why: str) -> EngineDead:
        """Kill the leader, because it `why`; the error that every later call raises."""
        return self._dead if self._dead is not None else self._die(why)

    @property
    def late(self) -> str:
        """What the leader takes unusually long for, "" if nothing; see `rollout.replica.pulse`."""
        return self._pulse.late

    def state(self) -> ReplicaState:
        """What the replica is and does right now."""
        reply = self.send(GetState())
        assert reply.state is not None
        return reply.state

    def idle(self) -> bool:
        """Whether every request submitted has had its final output."""
        return not self._open and not self._outputs

    def update_weights_inproc(
        self, begin: BeginUpdate, tensors: Iterable[tuple[str, Any]], *, lasting: bool = False
    ) -> UpdateReport:
        """Refused: tensors of this process do not reach another one."""
        raise UnsupportedOption(
            "a spawned replica cannot read this process's tensors; write safetensors files "
            "and send BeginUpdate, LoadFromDisk, CommitUpdate (the 'disk' transport)",
            field="transport",
        )

    def close(self) -> None:
        """Tell the leader to leave, kill it if it does not, and clean up. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            # A leader that is still loading would not read it.
            if self._ready and self._dead is None and self._process.poll() is None:
                self._channel.send([Call(id=0, command=Shutdown())], timeout_s=1.0)
                self._process.wait(_LEAVE_S)
        except (EngineDead, subprocess.TimeoutExpired):
            pass
        finally:
            self._channel.close()
            self._remove()

    def kill(self) -> None:
        """End the leader at once, without a word, and clean up. Idempotent."""
        self._closed = True
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spawn(self, config: EngineConfig, endpoint: str, factory: str) -> subprocess.Popen[bytes]:
        config_path = self._folder / "config.json"
        config_path.write_bytes(msgspec.json.encode(config))
        arguments = [endpoint, str(config_path), factory, str(os.getpid())]
        arguments += [self.hub] if self.hub else []
        # Threads of a CPU engine that spin at barriers take the processor from whoever feeds it.
        environment = child_environment(OMP_WAIT_POLICY="passive", RES_OPTIONS=RES_OPTIONS)
        # A Ctrl-C here is not one there.
        with self._log_path().open("a+b") as log:
            return subprocess.Popen(
                child_command("rollout.replica.leader_main", *arguments),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _send(self, messages: Sequence[Any]) -> None:
        """Send one frame. Raises InvalidRequest, having sent nothing, if a message cannot be
        encoded, EngineDead."""
        self._require_alive()
        self._send_frame(encode_frame(messages), timeout_s=self._reply_s)

    def _send_frame(self, frame: bytes, *, timeout_s: float) -> None:
        """Raises EngineDead if the leader takes nothing within `timeout_s`."""
        self._require_alive()
        if self._channel.sent_at_once(frame):
            return
        deadline = time.monotonic() + timeout_s
        while not self._channel.can_send(timeout_s=min(_POLL_S, timeout_s)):
            # A leader that has just left takes nothing; that is the better reason.
            code = self._process.poll()
            if code is not None:
                raise self._die(_exit_text(code))
            if time.monotonic() > deadline:
                raise self._die(f"took no message within {timeout_s:g} s")
        try:
            self._channel.send_frame(frame, timeout_s=_POLL_S)
        except EngineDead as error:
            raise self._die(error.message) from error

    def _receive(self, timeout_s: float) -> None:
        """Sort what arrives within `timeout_s`."""
        for message in self._take(timeout_s):
            if isinstance(message, Reply):
                self._replies[message.id] = message
            else:
                self._outputs.append(message)

    def _take(self, timeout_s: float) -> list[RequestOutput | Reply]:
        """What arrives within `timeout_s`; notices a leader that left."""
        self._require_alive()
        received = self._channel.receive(timeout_s=timeout_s)
        if not received and (exit_code := self._process.poll()) is not None:
            # What a leader sent last, before it left, is still delivered.
            received = self._channel.receive(timeout_s=0.0)
            if not received:
                raise self._die(_exit_text(exit_code))
        if received:
            self._heard_at = time.monotonic()
            self._ready = True
        else:
            self._look()
        return from_columns(received)

    def _look(self) -> None:
        """Every `_LOOK_S`, see whether the leader is alive and comes along."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            if self._stacks.asked:
                self._stacks.take(f"leader process {self._process.pid}")
            if why := self._pulse.look(now):
                raise self._die(why)
            if self._stuck_s and (why := self._pulse.stuck(self._stuck_s)):
                self._stacks.ask(why)

    def _await_reply(self, call: int, timeout_s: float, what: str) -> Reply:
        deadline = time.monotonic() + timeout_s
        while call not in self._replies:
            if time.monotonic() > deadline:
                raise self._die(f"did not answer '{what}' within {timeout_s:g} s")
            self._receive(_POLL_S)
        return unless_refused(self._replies.pop(call))

    def _require_alive(self) -> None:
        if self._dead is not None:
            raise self._dead.copy()
        if self._closed:
            raise EngineDead("the replica is closed", field="leader")

    def _die(self, why: str) -> EngineDead:
        """Kill the leader: its answers could no longer be told apart."""
        _kill(self._process)
        log = log_tail(self._log_path())
        cause = cause_of_death(log)
        message = f"leader process {self._process.pid} {why}" + (f": {cause}" if cause else "")
        tail = log[-_SHOWN_LOG:].strip()
        shown = f"{message}\nThe end of its log:\n{tail}" if tail else message
        self._dead = EngineDead(shown, field="leader")
        return self._dead

    def _log_path(self) -> Path:
        return self._folder / "leader.log"


def _own_folder() -> Path:
    """A new folder for sockets, the log and stacks. Raises InvalidRequest (`TMPDIR`)."""
    try:
        return Path(tempfile.mkdtemp(prefix="slipstream-"))
    except OSError as error:
        why = f"no temporary files can be written: {error}; name a folder by TMPDIR"
        raise InvalidRequest(why, field="TMPDIR") from error


def _remove(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.poll() is None:
        _kill(process)
    shutil.rmtree(folder, ignore_errors=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a leader and what it leaves behind: its ranks, which are of its process group, cannot
    leave by themselves if they are stopped."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _exit_text(code: int) -> str:
    if code == -signal.SIGKILL:
        return f"was killed by signal {-code} (by hand, or by the system for want of memory)"
    return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
