"""The weight commands of a leader: which run beside steps, which wait, in what order.

Forming a group and receiving wait for somebody else, so ranks run them on threads of their own
(`BesideSteps`), and the leader goes on with steps and every other command meanwhile. Commands
that open, close or read an update are short; they run between two steps, and only once no
transfer is in progress. Groups touch no update: they form and are left at any time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from engine.errors import SlipstreamError, of_command
from engine.protocol import (
    AbortUpdate,
    BesideSteps,
    Command,
    GroupCommand,
    GroupTransfer,
    Reply,
    TransferCommand,
)
from rollout.replica.command_replies import command_name

logger = logging.getLogger(__name__)


class PendingReply(Protocol):
    """A command that runs beside steps."""

    def done(self) -> bool:
        """Whether `result` would not wait."""
        ...

    def result(self) -> Reply:
        """Its reply; raises its typed error."""
        ...


class BesideExecutor(Protocol):
    """What the queue needs of the ranks."""

    def start(self, command: BesideSteps) -> PendingReply:
        """Run a command beside steps."""
        ...

    def cancel(self, reason: str, *, group: str = "") -> None:
        """Have transfers in progress end early; with `group`, only those that use it."""
        ...


class Ticket:
    """A command given to the leader: its reply or its typed error, once there is one."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self._reply: Reply | None = None
        self._error: SlipstreamError | None = None

    @property
    def name(self) -> str:
        """The command's name, as errors give it."""
        return command_name(self.command)

    def done(self) -> bool:
        """Whether `result` may be asked for."""
        return self._reply is not None or self._error is not None

    def result(self) -> Reply:
        """The reply; raises the command's typed error."""
        if self._error is not None:
            raise self._error
        assert self._reply is not None, "the command has not ended"
        return self._reply

    def settle(self, run: Callable[[], Reply]) -> None:
        """Run, and keep what it comes to. A boundary: a command that breaks ends itself, typed
        by `engine.errors.of_command`, and nothing else."""
        try:
            self._reply = run()
        except SlipstreamError as error:
            self._error = error
        except Exception as error:
            logger.exception("command %s", self.name)
            self._error = of_command(self.name, error)
            self._error.__cause__ = error


class WeightQueue:
    """Starts weight commands in order, as soon as each may.

    check: raises if a command may not come now. run: a command between two steps. ended: takes
    in the reply, or raises the error, of one that ran beside them. ends: whether an abort is of
    the update that is open.
    """

    def __init__(
        self,
        executor: BesideExecutor,
        *,
        check: Callable[[Command], None],
        run: Callable[[Command], Reply],
        ended: Callable[[BesideSteps, PendingReply], Reply],
        ends: Callable[[AbortUpdate], bool],
    ) -> None:
        self._executor = executor
        self._check = check
        self._run = run
        self._ended = ended
        self._ends = ends
        self._beside: list[tuple[Ticket, PendingReply]] = []
        self._waiting: deque[Ticket] = deque()

    @property
    def busy(self) -> bool:
        """Whether a command is in progress or waits for one."""
        return bool(self._beside or self._waiting)

    @property
    def in_progress(self) -> list[str]:
        """Names of those commands, those that wait last."""
        beside = [ticket.name for ticket, _ in self._beside]
        return beside + [ticket.name for ticket in self._waiting]

    def start(self, ticket: Ticket) -> None:
        """Take in one command. An abort of the open update ends transfers early."""
        if isinstance(ticket.command, GroupCommand):
            self._start_beside(ticket)
            return
        if isinstance(ticket.command, AbortUpdate) and self._ends(ticket.command):
            self._cancel(ticket.command)
        self._waiting.append(ticket)
        self.poll()

    def abandon(self, command: AbortUpdate) -> None:
        """Abort the update ahead of whatever waits; nobody reads the answer."""
        if any(ticket.command == command for ticket in self._waiting):
            return
        self._cancel(command)
        ticket = Ticket(command)
        self._waiting.appendleft(ticket)
        self.poll()

    def poll(self) -> None:
        """Take in what has ended, and start what may start. Cheap when there is nothing."""
        while any(pending.done() for _, pending in self._beside):
            at = next(i for i, (_, pending) in enumerate(self._beside) if pending.done())
            ticket, pending = self._beside.pop(at)
            command = ticket.command
            assert isinstance(command, BesideSteps)
            ticket.settle(lambda command=command, pending=pending: self._ended(command, pending))  # type: ignore[misc]
        while self._waiting and self._may_start(self._waiting[0].command):
            ticket = self._waiting.popleft()
            if isinstance(ticket.command, BesideSteps):
                self._start_beside(ticket)
            else:
                ticket.settle(lambda ticket=ticket: self._run(ticket.command))  # type: ignore[misc]

    def close(self) -> None:
        """Have everything in progress end early."""
        if self._beside:
            self._executor.cancel("the engine is closing")

    def _start_beside(self, ticket: Ticket) -> None:
        command = ticket.command
        assert isinstance(command, BesideSteps)

        def start() -> Reply:
            self._check(command)
            self._beside.append((ticket, self._executor.start(command)))
            return Reply()

        started = Ticket(command)
        started.settle(start)
        if not self._beside or self._beside[-1][0] is not ticket:
            ticket.settle(started.result)

    def _may_start(self, command: Command) -> bool:
        if isinstance(command, TransferCommand):
            return not self._forms(command)
        return not self._transfers()

    def _forms(self, command: TransferCommand) -> bool:
        """Whether the group that a transfer comes by is being joined or left."""
        if not isinstance(command, GroupTransfer):
            return False
        changing = [t.command for t, _ in self._beside if isinstance(t.command, GroupCommand)]
        return any(other.name == command.group for other in changing)

    def _transfers(self) -> bool:
        return any(isinstance(ticket.command, TransferCommand) for ticket, _ in self._beside)

    def _cancel(self, command: AbortUpdate) -> None:
        if self._transfers():
            self._executor.cancel(f"the update to version {command.version} was aborted")
