"""The steps of one further rank: its own plan out of each frame."""

from __future__ import annotations

import logging

from engine.errors import SlipstreamError
from engine.protocol import StepMasks, StepPlan
from rollout.ranks.board import StepBoard
from rollout.ranks.ranked_executor import RankExecutor
from rollout.ranks.results import ResultSender
from rollout.ranks.step_executor import PendingStep

logger = logging.getLogger(__name__)


class RankSteps:
    """Launches what comes. A refusal is every rank's alike.

    rank: of all. copy: of the model, of which this is a rank. results: sends what the copy samples;
    None where another rank does.
    """

    def __init__(
        self,
        executor: RankExecutor,
        board: StepBoard,
        *,
        rank: int,
        copy: int,
        results: ResultSender | None,
    ) -> None:
        self._executor = executor
        self._board = board
        self._rank = rank
        self._copy = copy
        self._results = results
        self._masked: PendingStep | None = None

    def launch(self, frame: StepPlan) -> None:
        """Queue the step."""
        plan = frame.copies()[self._copy]
        self._masked = None
        try:
            pending = self._executor.launch(plan)
        except SlipstreamError as error:
            logger.error("step %d refused: %s", plan.step, error)
            self._hand_on(plan.step, error)
            return
        self._board.note(self._rank, plan.step)
        if len(plan.masked):
            self._masked = pending
        else:
            self._hand_on(plan.step, pending)

    def mask(self, frame: StepMasks) -> None:
        """Queue the sampling of the step that waits for it, if this copy's does."""
        pending, self._masked = self._masked, None
        if pending is None:
            return
        masks = [frame, *frame.further][self._copy]
        try:
            self._executor.mask(masks)
        except SlipstreamError as error:
            logger.error("the masks of step %d refused: %s", masks.step, error)
            self._hand_on(masks.step, error)
            return
        self._hand_on(masks.step, pending)

    def require_alive(self) -> None:
        """Raise what keeps results from being sent, if anything does."""
        if self._results is not None:
            self._results.require_alive()

    def close(self) -> None:
        """Leave, what was sampled being sent."""
        if self._results is not None:
            self._results.close()

    def _hand_on(self, step: int, pending: PendingStep | SlipstreamError) -> None:
        if self._results is not None:
            self._results.put(step, pending)
