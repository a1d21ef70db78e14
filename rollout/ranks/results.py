"""What a further rank samples: sent by the first rank of each copy of the model but the leader's.

Steps are launched by the rank's own thread and waited for by another, so that the next one is
launched meanwhile.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue

from msgspec import Struct

from engine.errors import SlipstreamError
from engine.protocol import ErrorInfo, StepResult
from rollout.ranks.step_executor import PendingStep
from rollout.replica.command_replies import error_info
from rollout.replica.ipc import Channel

logger = logging.getLogger(__name__)

_SEND_S = 30.0
_LEAVE_S = 2.0


class RankResult(Struct, frozen=True, kw_only=True, tag="rank_result"):
    """The result of a step, or the typed error that it ended with."""

    step: int
    result: StepResult | None = None
    error: ErrorInfo | None = None


class ResultSender:
    """Sends results in the order in which steps are handed to it. channel: nobody else's."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: SimpleQueue[tuple[int, PendingStep | SlipstreamError] | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._send_all, name="results", daemon=True)
        self._thread.start()

    def put(self, step: int, pending: PendingStep | SlipstreamError) -> None:
        """Have the result of a step sent once it is there, or the error of one that was refused.

        Raises what kept an earlier one from being sent.
        """
        self.require_alive()
        self._queue.put((step, pending))

    def require_alive(self) -> None:
        """Raise what keeps results from being sent, if anything does."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Send what is there, and leave."""
        self._queue.put(None)
        self._thread.join(_LEAVE_S)

    def _send_all(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._channel.send([_result(*item)], timeout_s=_SEND_S)
        except Exception as error:
            # The end of a thread: the rank's own raises it, and its process ends.
            logger.exception("a result was not sent")
            self._failure = error
        finally:
            self._channel.close(linger_s=_LEAVE_S)


def _result(step: int, pending: PendingStep | SlipstreamError) -> RankResult:
    if isinstance(pending, SlipstreamError):
        return RankResult(step=step, error=error_info(pending))
    try:
        return RankResult(step=step, result=pending.result())
    except SlipstreamError as error:
        return RankResult(step=step, error=error_info(error))
