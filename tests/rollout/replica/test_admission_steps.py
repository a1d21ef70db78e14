"""How many plans a request waits for that reaches a leader while it steps: counted, not timed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from engine.protocol import Call, Shutdown, StepPlan, StepResult
from rollout.replica import leader_main
from rollout.replica.fronts.front_door import FrontDoor
from rollout.replica.ipc import Channel
from rollout.replica.leader import Leader
from rollout.replica.pulse import Pulse, pulse_path
from tests.helpers.fake_executor import FakeExecutor
from tests.helpers.replicas import fake_config, make_request

STEPS, CALLERS = 12, 20


class Inbox:
    """The leader's end of a channel, for which a message has arrived once it is sent."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def receive_waiting(self, *, timeout_s: float, max_messages: int) -> list[Any]:
        taken, self.waiting = self.waiting[:max_messages], self.waiting[max_messages:]
        return taken

    def send(self, messages: Sequence[Any], *, timeout_s: float) -> None:
        pass


class Busy(FakeExecutor):
    """While each of the first steps runs, `CALLERS` requests arrive.

    sent_in: by number of the request, the step that ran then. planned_in: the step that took
    it in.
    """

    def __init__(self, config: Any, inbox: Inbox) -> None:
        super().__init__(config)
        self._inbox = inbox
        self.sent_in: dict[int, int] = {}
        self.planned_in: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for row in plan.new_rows:
            self.planned_in[_number(row.token_ids.tolist())] = plan.step
        if plan.step < STEPS:
            self.send(CALLERS, plan.step)
        elif plan.step == STEPS + 3:
            self._inbox.waiting.append(Call(id=1, command=Shutdown()))
        return super().execute(plan)

    def send(self, count: int, step: int) -> None:
        for _ in range(count):
            number = len(self.sent_in)
            self.sent_in[number] = step
            request = make_request(f"r{number}", _prompt(number), max_new_tokens=2 * STEPS)
            self._inbox.waiting.append(request)


def _prompt(number: int) -> list[int]:
    """A prompt that tells which request it is of."""
    return [3 + number // 16, 3 + number % 16, 4]


def _number(prompt: list[int]) -> int:
    return 16 * (prompt[0] - 3) + prompt[1] - 3


@pytest.mark.parametrize("overlap", [False, True])
def test_every_request_is_in_the_first_or_second_plan_after_its_arrival(
    overlap: bool, tmp_path: Path
) -> None:
    config, inbox = fake_config(num_pages=5000), Inbox()
    scheduler = replace(config.scheduler, max_running=1024, max_step_tokens=8192, overlap=overlap)
    config = replace(config, scheduler=scheduler)
    executor = Busy(config, inbox)
    executor.send(1, -1)
    leader = Leader(config, executor)
    pulse = Pulse(pulse_path(tmp_path))
    leader_main._serve(
        leader, FrontDoor(cast(Channel, inbox)), None, pulse, parent_pid=os.getppid()
    )
    assert len(executor.sent_in) == STEPS * CALLERS + 1
    assert executor.planned_in.keys() == executor.sent_in.keys()
    waited = {executor.planned_in[number] - step for number, step in executor.sent_in.items()}
    assert waited <= {1, 2}
