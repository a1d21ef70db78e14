"""Every command about weights, of one rank: one entry, one owner for each kind of state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from engine.errors import UnsupportedOption
from engine.parallel.mesh import Mesh
from engine.protocol import (
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    EngineCommand,
    GetWeight,
    JoinGroup,
    LeaveGroup,
    LoadFromDisk,
    PrepareUpdate,
    ReceiveBroadcast,
    ReceiveIpc,
    Reply,
)
from engine.weights.groups import Groups
from engine.weights.inspect import WeightInspector
from engine.weights.ipc import IpcReceiver
from engine.weights.load import Loadable
from engine.weights.receive import receive_broadcast
from engine.weights.session import UpdateSession
from engine.weights.sources import disk


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
        self._ipc = IpcReceiver(self.session, device, mesh)
        self._inspector = WeightInspector(self.session, mesh, require_weights)

    def handle(self, command: EngineCommand) -> Reply:
        """Run one weight command; raises its typed error."""
        match command:
            case BeginUpdate():
                update = self.session.begin(command)
                return Reply(in_place=update.in_place, undo=update.undo is not None)
            case JoinGroup():
                self.groups.join(command)
            case LeaveGroup():
                self.groups.leave(command.name)
            case ReceiveBroadcast():
                receive_broadcast(self.session, self.groups, command)
            case ReceiveIpc():
                self._ipc.receive(command)
            case LoadFromDisk():
                disk.receive(self.session, Path(command.path), partial=command.partial)
            case PrepareUpdate():
                self.session.prepare(command.version)
            case CommitUpdate():
                return Reply(report=self.session.commit(command.version))
            case AbortUpdate():
                self.session.abort(command.version)
            case CheckWeights():
                return Reply(weights=[self._inspector.check(command.action)])
            case GetWeight():
                return Reply(weights=[self._inspector.values(command.name, command.count)])
            case _:
                kind = type(command).__name__
                raise UnsupportedOption(f"{kind} is not served by this engine", field=kind)
        return Reply()

    def close(self) -> None:
        """Leave every group and unmap what trainers lent. Idempotent."""
        self.groups.close()
        self._ipc.close()
