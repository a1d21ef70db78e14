"""Commands and their replies, for whoever sends one and waits: names, deadlines, errors."""

from __future__ import annotations

import logging
from collections.abc import Callable

from engine.errors import SlipstreamError, by_name, of_command
from engine.protocol import Command, EngineCommand, ErrorInfo, GroupTransfer, JoinGroup, Reply
from engine.protocol.deadlines import deadlines

logger = logging.getLogger(__name__)


def command_name(command: Command) -> str:
    """The tag of a command, as errors name it."""
    return str(command.__struct_config__.tag)


def error_info(error: SlipstreamError) -> ErrorInfo:
    """The error as it crosses a process boundary."""
    return ErrorInfo(kind=type(error).__name__, message=error.message, field=error.field)


def reply_of(command: Command, run: Callable[[], Reply]) -> Reply:
    """What `run` answers to the command, or the error that it raised: what a rank says."""
    try:
        return run()
    except SlipstreamError as error:
        return Reply(error=error_info(error))
    except Exception as error:
        # A boundary: a command that breaks ends itself; the leader sees to ranks that differ.
        name = command_name(command)
        logger.exception("command %s", name)
        return Reply(error=error_info(of_command(name, error)))


def unless_refused(reply: Reply) -> Reply:
    """`reply`; raises the typed error that it carries, if it does."""
    if reply.error is not None:
        raise by_name(reply.error.kind, reply.error.message, reply.error.field)
    return reply


def reply_deadline_s(command: Command, *, reply_s: float, slow_s: float) -> float:
    """How long the leader may take to answer: `slow_s` for what touches weights or memory, else
    `reply_s`; and for what brings its own deadline what the table of deadlines says, so that its
    typed error comes first."""
    if isinstance(command, JoinGroup | GroupTransfer):
        return max(slow_s, deadlines(command).caller)
    return slow_s if isinstance(command, EngineCommand) else reply_s
