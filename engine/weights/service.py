"""Every command about weights, of one rank: one entry, one owner for each kind of state."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from engine.errors import GroupError, UnsupportedOption
from engine.parallel.mesh import Mesh
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    EngineCommand,
    GetWeight,
    GroupCommand,
    JoinGroup,
    LeaveGroup,
    LoadFromDisk,
    PlanExcerpts,
    PrepareUpdate,
    ReceiveBroadcast,
    ReceiveExcerpts,
    ReceiveIpc,
    Reply,
)
from engine.protocol.deadlines import ABORT_S, CLOSE_S
from engine.weights.catalog import Loadable
from engine.weights.groups import Groups
from engine.weights.helpers import nothing
from engine.weights.inspect import WeightInspector
from engine.weights.ipc import IpcReceiver
from engine.weights.lane import Crew, Lane, Look, PendingCommand
from engine.weights.receive import receive_broadcast
from engine.weights.receive_excerpts import ExcerptReceiver
from engine.weights.session import UpdateSession
from engine.weights.sources import disk

logger = logging.getLogger(__name__)


class WeightService:
    """Handles the weight commands of one rank.

    agree: the least of every rank's value; `Collectives.minimum`. require_weights: raises
    MemoryReleased while the weights are released.
    """

    def __init__(
        self,
        model: Loadable,
        *,
        version: int,
        device: torch.device,
        mesh: Mesh,
        agree: Callable[[int], int],
        require_weights: Callable[[], None],
    ) -> None:
        self.session = UpdateSession(
            model, version=version, agree=agree, require_weights=require_weights
        )
        self.groups = Groups(device, mesh)
        self._lane = Lane(device)
        self._crew = Crew()
        self._excerpts = ExcerptReceiver(self.session, self.groups)
        self._ipc = IpcReceiver(self.session, device, mesh)
        self._inspector = WeightInspector(self.session, mesh, require_weights)

    def start(self, command: EngineCommand) -> PendingCommand:
        """Run a `BesideSteps` command beside whatever this thread does next; returns at once.

        Transfers run one after another, on a stream of their own; groups form and are left all
        at once. A group that is joined or left ends what still forms or uses one of its name; if
        that does not end in time, the command fails with GroupError.
        """
        if not isinstance(command, GroupCommand):
            return self._lane.start(command, lambda look: self.handle(command, look))
        if isinstance(command, JoinGroup) and self.groups.is_open(command):
            return self._crew.start(command, lambda look: self.handle(command, look))
        name = command.name
        before = self.cancel(f"group {name!r} is joined anew or left", group=name)

        def run(look: Look) -> Reply:
            # One at a time uses a group; those before were told to end.
            for pending in before:
                if not pending.wait(2 * ABORT_S, look):
                    what = type(pending.command).__name__
                    raise GroupError(f"{what} still uses group {name!r}", field="name")
            return self.handle(command, look)

        return self._crew.start(command, run)

    def cancel(self, reason: str, *, group: str = "") -> list[PendingCommand]:
        """Have transfers end early; with `group`, only what forms or uses that group. Returns
        what has been told so."""
        forming: list[PendingCommand] = []
        if group:
            forming = self._crew.cancel(reason, lambda found: getattr(found, "name", "") == group)
        return forming + self._lane.cancel(
            reason, lambda found: not group or getattr(found, "group", "") == group
        )

    def handle(self, command: EngineCommand, look: Look = nothing) -> Reply:
        """Run one weight command here; raises its typed error. look: called while it waits."""
        match command:
            case BeginUpdate():
                update = self.session.begin(command)
                return Reply(in_place=update.in_place, undo=update.undo is not None)
            case JoinGroup():
                self.groups.join(command, look)
            case LeaveGroup():
                self.groups.drop(command.name)
            case ReceiveBroadcast():
                receive_broadcast(self.session, self.groups, command, look)
            case PlanExcerpts():
                return Reply(excerpts=[self._excerpts.plan(command)])
            case ReceiveExcerpts():
                self._excerpts.receive(command, look)
            case ReceiveIpc():
                self._ipc.receive(command, look)
            case LoadFromDisk():
                disk.receive(self.session, command, look)
            case PrepareUpdate():
                self.session.prepare(command.version, command.owner)
            case CommitUpdate():
                report = self.session.commit(command.version, command.owner)
                return Reply(report=report, refusal=self.session.refusal)
            case AbortUpdate():
                self.session.abort(command.version, command.owner)
            case CheckWeights():
                found = self._inspector.check(command.action)
                return Reply(weights=[found], refusal=self.session.refusal)
            case GetWeight():
                return Reply(weights=[self._inspector.values(command.name, command.count)])
            case _:
                kind = type(command).__name__
                raise UnsupportedOption(f"{kind} is not served by this engine", field=kind)
        return Reply()

    def close(self) -> None:
        """Give up what runs, leave every group and unmap what trainers lent. Idempotent."""
        self._crew.cancel("the engine is closing")
        if not self._lane.close(CLOSE_S):
            # Whatever it is stuck in may still use groups and memory: they go with the process.
            logger.warning("a transfer does not end; its group is left to the process's end")
            return
        self.groups.close()
        self._ipc.close()
