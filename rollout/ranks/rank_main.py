"""A further rank: `python -m rollout.ranks.rank_main ENDPOINT FOLDER FACTORY RANK PARENT`.

`rollout.ranks.process` starts it. FOLDER holds what `RankFiles` names, FACTORY is the
"module:function" that builds a rank, PARENT the process to outlive by no more than a moment.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.errors import SlipstreamError
from engine.protocol import (
    BesideSteps,
    Call,
    CancelTransfers,
    EngineCommand,
    Reply,
    Shutdown,
    StepMasks,
    StepPlan,
)
from rollout.logs.stack_dump import register_stacks
from rollout.ranks.board import StepBoard
from rollout.ranks.process import RankFiles, results_endpoint
from rollout.ranks.rank_steps import RankSteps
from rollout.ranks.ranked_executor import RankExecutor, resolve
from rollout.ranks.results import ResultSender
from rollout.replica.command_replies import error_info, reply_of
from rollout.replica.ipc import Channel
from rollout.replica.leave import run_and_leave
from rollout.replica.process_log import log_to_stderr
from rollout.replica.weight_queue import PendingReply

_IDLE_S = 1.0
_BESIDE_S = 0.001
"""Between looks at commands that run beside steps."""
_SEND_S = 30.0
_PARENT_POLL_S = 0.5
_ORPHANED = 4


def main(argv: list[str]) -> int:
    """Build the rank and execute what comes until told to leave."""
    endpoint, folder, factory, number, parent = argv
    rank, files = int(number), RankFiles(folder=Path(folder))
    log_to_stderr(f"rank {rank}")
    register_stacks(files.folder, f"rank {rank}")
    _leave_with(int(parent))
    channel = Channel.connect(endpoint, Call | StepPlan | StepMasks | CancelTransfers | Shutdown)
    try:
        return _build_and_serve(channel, endpoint, files, factory, rank)
    finally:
        channel.close(linger_s=_SEND_S)


def _build_and_serve(
    channel: Channel, endpoint: str, files: RankFiles, factory: str, rank: int
) -> int:
    config = msgspec.json.decode(files.config.read_bytes(), type=EngineConfig)
    board = StepBoard(files.board, config.parallel.num_ranks)
    build = resolve(factory)
    channel.send([Reply()], timeout_s=_SEND_S)
    try:
        executor: RankExecutor = build(config, rank=rank, meeting_place=str(files.meeting_place))
    except SlipstreamError as error:
        channel.send([Reply(error=error_info(error))], timeout_s=_SEND_S)
        return 1
    channel.send([Reply()], timeout_s=_SEND_S)
    copy, tp_rank = divmod(rank, config.parallel.tp_size)
    results = None
    if copy and not tp_rank:
        results = ResultSender(Channel.connect(results_endpoint(endpoint), Reply))
    steps = RankSteps(executor, board, rank=rank, copy=copy, results=results)
    _serve(executor, channel, steps)
    steps.close()
    executor.close()
    return 0


def _leave_with(parent: int) -> None:
    """End this process, whatever it waits for, once `parent` is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(_ORPHANED)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _serve(executor: RankExecutor, channel: Channel, steps: RankSteps) -> None:
    beside: dict[int, tuple[EngineCommand, PendingReply]] = {}
    while True:
        steps.require_alive()
        for message in channel.receive(timeout_s=_BESIDE_S if beside else _IDLE_S):
            match message:
                case Shutdown():
                    return
                case StepPlan():
                    steps.launch(message)
                case StepMasks():
                    steps.mask(message)
                case CancelTransfers():
                    executor.cancel(message.reason, group=message.group)
                case Call() if isinstance(message.command, BesideSteps):
                    beside[message.id] = message.command, executor.start(message.command)
                case _:
                    command = message.command
                    _reply(channel, message.id, command, partial(executor.handle, command))
        for call in [call for call, (_, pending) in beside.items() if pending.done()]:
            command, pending = beside.pop(call)
            _reply(channel, call, command, pending.result)


def _reply(channel: Channel, call: int, command: EngineCommand, run: Callable[[], Reply]) -> None:
    channel.send([replace(reply_of(command, run), id=call)], timeout_s=_SEND_S)


if __name__ == "__main__":
    run_and_leave(main, sys.argv[1:])
