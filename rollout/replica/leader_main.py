"""The spawned leader: `python -m rollout.replica.leader_main ENDPOINT CONFIG FACTORY PARENT [HUB]`.

`rollout.replica.spawned` starts it. CONFIG is an `EngineConfig` as a JSON file, FACTORY
the "module:function" that builds a rank from it, PARENT the process to outlive by
no more than `_IDLE_S`. HUB is where front processes come in beside that one, if any may.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.errors import InvalidRequest, SlipstreamError
from engine.protocol import LeaderMessage, Reply, Request, RequestOutput, Shutdown
from engine.protocol.deadlines import watch_s
from rollout.collector import settle
from rollout.logs.stack_dump import note_rows, register_stacks
from rollout.ranks.ranked_executor import RankedExecutor, build_executor
from rollout.ranks.watched_executor import WatchedExecutor
from rollout.replica.command_replies import error_info
from rollout.replica.fronts.front_door import FrontDoor
from rollout.replica.ipc import Channel, Hub, Unreadable
from rollout.replica.leader import Leader
from rollout.replica.leave import run_and_leave
from rollout.replica.process_log import log_to_stderr
from rollout.replica.pulse import Activity, Pulse, pulse_path
from rollout.replica.weight_queue import Ticket
from rollout.requests.outputs import refused_id

logger = logging.getLogger(__name__)

_IDLE_S = 1.0
_BESIDE_S = 0.001
"""Between looks at commands that run beside steps, while there is no step."""
_SEND_S = 30.0
_MAX_MESSAGES = 1024
"""After which a step has its turn, whatever still waits."""


def main(argv: list[str]) -> int:
    """Build the engine, say so, and serve until told to stop or orphaned."""
    endpoint, config_path, factory, parent, *hub = argv
    log_to_stderr("leader")
    channel = Channel.connect(endpoint, LeaderMessage)
    folder = Path(config_path).parent
    register_stacks(folder, "leader")
    pulse = Pulse(pulse_path(folder))
    try:
        config = msgspec.json.decode(Path(config_path).read_bytes(), type=EngineConfig)
        executor = build_executor(config, factory, folder=folder)
        collective_s = config.parallel.timeout_s
        watched = WatchedExecutor(executor, pulse, collective_s=collective_s)
        # Now, while nobody is kept waiting.
        leader = Leader(config, watched, loads_grammars=True)
    except SlipstreamError as error:
        channel.send([Reply(error=error_info(error))], timeout_s=_SEND_S)
        channel.close(linger_s=_SEND_S)
        return 1
    door = FrontDoor(channel, Hub(hub[0], LeaderMessage) if hub else None)
    channel.send([Reply(state=leader.state())], timeout_s=_SEND_S)
    # The model stays to the end: a collection need not look through it again and again.
    settle()
    ranks = executor if isinstance(executor, RankedExecutor) else None
    pulse.on_slow = partial(_note_rows, folder, leader)
    pulse.start()
    alone = False
    try:
        alone = _serve(leader, door, ranks, pulse, parent_pid=int(parent))
    finally:
        pulse.stop()
        leader.close()
        door.close(linger_s=0.0 if alone else _SEND_S)
    return int(ranks is not None and ranks.failure is not None)


def _note_rows(folder: Path, leader: Leader) -> None:
    """Of a step that has taken long, from another thread than the one that is at it."""
    try:
        note_rows(folder, leader.running_rids())
    except (RuntimeError, OSError) as error:
        # It went on meanwhile, or the disk is full: neither may end the thread that beats.
        logger.warning("the rows of a slow step are not noted: %s", error)


def _serve(
    leader: Leader,
    door: FrontDoor,
    ranks: RankedExecutor | None,
    pulse: Pulse,
    *,
    parent_pid: int,
) -> bool:
    """Everything that waits first, then one step: so a request is in the next plan, and a
    command waits for one step at most. A flood of messages leaves steps their turn. A command
    that runs beside steps is answered when it has ended.

    A leader whose ranks are gone leaves as soon as it has said so. Returns whether it was
    orphaned, so that nobody reads what it has sent.
    """
    beside: dict[int, Ticket] = {}
    turn_s = watch_s(builds=False)
    while os.getppid() == parent_pid:
        if ranks is not None and ranks.failure is not None and not leader.can_step():
            logger.error("%s", ranks.failure)
            return False
        pulse.begin(Activity.WAITING)
        began, wait_s = time.monotonic(), _wait_s(leader)
        messages = door.receive_waiting(timeout_s=wait_s, max_messages=_MAX_MESSAGES)
        leader.idle_s += time.monotonic() - began if wait_s else 0.0
        pulse.begin(Activity.HOST, turn_s)
        answers, leaving = _obey(leader, messages, beside)
        leader.poll()
        answers += _ended(beside)
        if answers:
            door.send(answers)
        if leaving:
            return False
        if leader.can_step():
            outputs = leader.step()
            if outputs:
                door.send(outputs)
    logger.warning("process %d is gone; leaving", parent_pid)
    return True


def _wait_s(leader: Leader) -> float:
    """How long to wait for messages: not at all while there is something to do."""
    if leader.can_step():
        return 0.0
    return _BESIDE_S if leader.busy() else _IDLE_S


def _obey(
    leader: Leader, messages: list[Any], beside: dict[int, Ticket]
) -> tuple[list[Reply | RequestOutput], bool]:
    """Take in messages, in order; what is to be answered at once, and whether to leave.

    beside: filled with commands that have not ended, by the id of their call.
    """
    answers: list[Reply | RequestOutput] = []
    for kind, group in groupby(messages, key=type):
        if kind is Request:
            leader.submit(list(group), decoded=True)
            continue
        for message in group:
            if isinstance(message, Unreadable):
                answers += _refuse(message)
            elif isinstance(message.command, Shutdown):
                return answers, True
            else:
                ticket = leader.start(message.command)
                if ticket.done():
                    answers.append(_reply(message.id, ticket))
                else:
                    beside[message.id] = ticket
    return answers, False


def _ended(beside: dict[int, Ticket]) -> list[Reply | RequestOutput]:
    """The replies of those commands that have ended, which are forgotten."""
    ended = [call for call, ticket in beside.items() if ticket.done()]
    return [_reply(call, beside.pop(call)) for call in ended]


def _reply(call: int, ticket: Ticket) -> Reply:
    try:
        return replace(ticket.result(), id=call)
    except SlipstreamError as error:
        return Reply(id=call, error=error_info(error))


def _refuse(message: Unreadable) -> list[Reply | RequestOutput]:
    """The typed answer to a message outside the protocol, if it says whom to answer."""
    logger.error("%s", message.why)
    error = InvalidRequest(message.why, field="message")
    if message.call is not None:
        return [Reply(id=message.call, error=error_info(error))]
    if message.rid:
        return [refused_id(message.rid, error)]
    return []


if __name__ == "__main__":
    run_and_leave(main, sys.argv[1:])
