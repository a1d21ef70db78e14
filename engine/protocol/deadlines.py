"""The one table of deadlines: how long each layer waits for what the layer inside it does.

A command passes through layers, from the inside out: the operation itself, on a rank; rank 0,
which waits for the others; the monitor, which ends ranks that miss their time; the leader,
which may have a step to finish first; whoever called the leader (the server's event loop, or
`ProcessReplica`); a trainer that called over HTTP. Each waits longer than the one inside it, so
that the innermost error, which knows why, comes first and the outer ones never do. All in
seconds. Pure functions; tests assert the order for every command.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.protocol.commands import CheckWeights, Command, EngineCommand, GetState, StopProfile
from engine.protocol.updates import (
    AbortUpdate,
    BeginUpdate,
    CommitUpdate,
    JoinGroup,
    LeaveGroup,
    LoadFromDisk,
    PlanExcerpts,
    PrepareUpdate,
    ReceiveBroadcast,
    ReceiveExcerpts,
    ReceiveIpc,
)

RES_OPTIONS = "timeout:1 attempts:5"
"""For the environment variable of that name, by which glibc's resolver asks again after one second
in place of five (resolv.conf(5)). torch's stores look up the name of every peer for their log;
they connect by IPv6, `::ffff:127.0.0.1` included, which no /etc/hosts names, so that one lost
packet of a name server stalls whoever forms a group."""
MAX_TIMEOUT_S = 1800.0
"""Longest `timeout_s` that a caller may give; more is cut to it."""
COLLECTIVE_S = 60.0
"""Default of one collective between the ranks of a replica (`ParallelConfig.timeout_s`)."""
STEP_S = 120.0
"""Launch of one step whose kernels and graphs are there, and waiting for its result."""
LAUNCH_S = 300.0
"""Launch of one step, which compiles kernels and captures graphs where they are new."""
MASK_S = 60.0
"""Most that a step waits for the masks of its rows (`SchedulerConfig.mask_timeout_s`)."""
SILENT_S = 90.0
"""No sign of life from a leader's process, whose thread for that needs nothing but the
interpreter: it was stopped, or hangs."""
AGREE_S = 120.0
"""Ranks agreeing about an update: all were told at once, and each did the same before."""
START_S = 1800.0
"""A replica becoming ready: weights loaded, graphs captured. Also what a caller allows for a
weight command without a deadline of its own: more than any of them needs."""
MEET_S = 300.0
"""Every rank of a replica coming to the place where they meet."""
START_AGREE_S = 1500.0
"""Ranks agreeing while they start, some having loaded their weights much sooner."""
ABORT_S = 20.0
"""NCCL giving up on a communicator."""
CLOSE_S = 5.0
"""A transfer ending early, once its engine closes."""

_MARGIN_S = 15.0
_SLOW_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long each layer waits for one command, counted from when that layer hands it on; and,
    for a command that others are ahead of, from when the last of those was answered.

    operation: what the command itself does on one rank. rank: rank 0 for another rank's reply.
    monitor: all ranks. leader: the leader's answer, a step in progress included. caller: whoever
    sent the command to the leader. http: a client of the server's `/command`.
    """

    operation: float
    rank: float
    monitor: float
    leader: float
    caller: float
    http: float

    def layers(self) -> tuple[float, ...]:
        """From the inside out."""
        return (self.operation, self.rank, self.monitor, self.leader, self.caller, self.http)


def deadlines(command: Command, *, collective_s: float = COLLECTIVE_S) -> Deadlines:
    """The deadlines of one command. collective_s: of the replica's configuration."""
    operation = operation_s(command)
    rank = max(operation + AGREE_S, collective_s) + _MARGIN_S
    monitor = rank + _MARGIN_S
    leader = monitor + step_s(collective_s)
    return Deadlines(
        operation=operation,
        rank=rank,
        monitor=monitor,
        leader=leader,
        caller=leader + _MARGIN_S,
        http=leader + 2 * _MARGIN_S,
    )


def operation_s(command: Command) -> float:
    """How long what a command does may take on a rank; a caller's own deadline, capped."""
    match command:
        case JoinGroup() | ReceiveBroadcast() | PlanExcerpts() | ReceiveExcerpts():
            return capped(command.timeout_s) + ABORT_S
        case LoadFromDisk() | ReceiveIpc() | CheckWeights() | StopProfile():
            return _SLOW_S
        case BeginUpdate() | PrepareUpdate() | CommitUpdate() | AbortUpdate() | LeaveGroup():
            return _SLOW_S / 2
        case _ if isinstance(command, EngineCommand):
            return _SLOW_S / 2
        case _:
            return 0.0


def capped(timeout_s: float) -> float:
    """A caller's deadline as it is used: what is no number waits for nothing."""
    return min(timeout_s, MAX_TIMEOUT_S) if timeout_s > 0 else 0.0


def step_s(collective_s: float = COLLECTIVE_S) -> float:
    """How long one step may keep the leader: its launch, masks that it waits for, its result."""
    return launch_s(collective_s) + MASK_S + max(collective_s, COLLECTIVE_S)


def launch_s(collective_s: float = COLLECTIVE_S, *, builds: bool = True) -> float:
    """How long the launch of one step may take, on every rank. builds: it may have to build
    kernels and graphs first."""
    return max(collective_s, LAUNCH_S if builds else STEP_S)


def watch_s(collective_s: float = COLLECTIVE_S, *, builds: bool) -> float:
    """How long a leader may be at the launch, or the result, of one step before whoever started
    it ends it: longer than the ranks' own deadlines, whose errors name a rank."""
    return launch_s(collective_s, builds=builds) + _MARGIN_S


REPLY_S = deadlines(GetState()).caller
"""What a caller of the leader allows for a command that touches neither weights nor memory."""
