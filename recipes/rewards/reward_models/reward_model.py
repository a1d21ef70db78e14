"""A reward model as a reward: an engine of its own that scores chats and their replies.

The reward is the raw score of a sequence classifier (`...ForSequenceClassification`) at the last
token, without any scale: a model trained on pairs by the loss of Bradley and Terry (Ouyang et al.,
arXiv 2203.02155) fixes differences of rewards, not their size.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence

from engine.config import EngineConfig
from engine.errors import EngineDead, InvalidRequest, SlipstreamError
from engine.protocol import FlushCache, IntArray, ReplicaState, RequestOutput
from recipes.actors.fleet_engine import FleetEngine, Launch
from recipes.rewards.base import Failed, Grade, Item, as_grade
from recipes.rewards.reward_models.model_chat import ModelChat
from rollout.launch import launch as launch_replica
from rollout.offline import Tokenizer, classify_request

logger = logging.getLogger(__name__)


class RewardModel:
    """A `Reward`: scores by one replica, in a process of its own, that is started again when it
    dies. Calls are served one after the other."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        *,
        label: int = 0,
        launch: Launch | None = None,
    ) -> None:
        """Start the replica, which loads `config.model`, and wait for it.

        label: which of the model's scores is the reward. launch: starts the replica, by default in
        a process of its own. Raises ModelError, OutOfMemory or EngineDead, and InvalidRequest
        (`reward`, `reward_label`) for a model that scores nothing, or not that label.
        """
        self._launch = launch or (lambda: launch_replica(config, process=True))
        self._engine = FleetEngine(0, self._launch(), self._launch)
        self._label = label
        self._one_caller = threading.Lock()
        self._is_open = True
        try:
            state = self._engine.state()
            check_label(state, label, model=config.model)
        except SlipstreamError:
            self._engine.close()
            raise
        self._chat = ModelChat(tokenizer, state.context_length)

    async def grade(self, items: Sequence[Item]) -> list[Grade]:
        """See `Reward`. A replica that dies is started again once a call; what it loses twice, and
        whatever it does not score, is `Failed`."""
        return await asyncio.to_thread(self._grade, items)

    async def close(self) -> None:
        """See `Reward`. Waits for a call under way."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._one_caller:
            if self._is_open:
                self._is_open = False
                self._engine.close()

    def _grade(self, items: Sequence[Item]) -> list[Grade]:
        chats = [self._chat.ids(item) for item in items]
        # Equal chats have equal rewards to the bit, wherever they are in a batch: a group whose
        # replies are all the same has no spread.
        asked = {ids.tobytes(): ids for ids in chats if not isinstance(ids, Failed)}
        with self._one_caller:
            if not self._is_open:
                raise EngineDead("the reward model was closed", field="reward")
            done, lost = self._scored(asked.values())
        died = Failed(kind="died", reason=f"the reward model's engine: {lost}")
        known: dict[bytes, Grade] = {
            key: self._grade_of(done[rid]) if rid in done else died
            for key, rid in zip(asked, map(_rid, range(len(asked))), strict=True)
        }
        return [c if isinstance(c, Failed) else known[c.tobytes()] for c in chats]

    def _scored(self, asked: Iterable[IntArray]) -> tuple[dict[str, RequestOutput], str]:
        """Outputs by `_rid` of their place, and by what the engine was lost twice, if it was."""
        requests = [classify_request(_rid(place), ids) for place, ids in enumerate(asked)]
        done: dict[str, RequestOutput] = {}
        try:
            lost = self._engine.generate(requests, done)
            if lost is not None:
                logger.warning("the reward model's engine is lost: %s", lost)
                self._engine.revive()
                lost = self._engine.generate([r for r in requests if r.rid not in done], done)
            if lost is None:
                # What later calls return does not depend on earlier ones: nor does a resumed run.
                self._engine.send(FlushCache())
        except SlipstreamError as error:
            lost = error
        return done, "" if lost is None else str(lost)

    def _grade_of(self, output: RequestOutput) -> Grade:
        if output.scores is not None:
            return as_grade(output.scores[self._label])
        assert output.finish is not None
        message = output.finish.message or "no score came"
        if output.finish.error == "ContextTooLong":
            return Failed(kind="too_long", reason=message)
        if output.finish.error == "NonFiniteLogits":
            return Failed(kind="not_finite", reason=message)
        return Failed(kind="raised", reason=message)


def _rid(place: int) -> str:
    return f"reward-{place}"


def check_label(state: ReplicaState, label: int, *, model: str) -> None:
    """Raise InvalidRequest naming the option unless the replica's model scores that label."""
    if state.num_labels == 0:
        raise InvalidRequest(
            f"reward: {model} generates text and has no classification head; give a "
            "...ForSequenceClassification checkpoint",
            field="reward",
        )
    if label >= state.num_labels:
        raise InvalidRequest(
            f"reward_label is {label}; {model} has {state.num_labels} labels, counted from 0",
            field="reward_label",
        )
