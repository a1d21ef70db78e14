"""Signs of life: a leader that hangs is told from one that builds and from one that was stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig
from engine.errors import OutOfMemory
from engine.protocol import BeginUpdate, CheckWeights
from engine.protocol.deadlines import MAX_TIMEOUT_S, REPLY_S, SILENT_S, deadlines, watch_s
from rollout.ranks.watched_executor import WatchedExecutor
from rollout.replica.leader import Leader
from rollout.replica.pulse import Activity, Pulse, PulseWatch, pulse_path
from tests.helpers.fake_executor import FakeExecutor
from tests.helpers.replicas import fake_config, make_request


class Ends:
    """Both ends of a pulse, on a clock that the test turns. `pass_s`: time that goes by, looked at
    once a second; the first reason why the leader has to be given up."""

    def __init__(self, folder: Path) -> None:
        self.pulse = Pulse(pulse_path(folder))
        self.watch = PulseWatch(pulse_path(folder))
        self.now = 1000.0
        self.watch.look(self.now)
        self.beat()
        self.watch.look(self.now)

    def beat(self) -> None:
        self.pulse._words[0] += 1

    def pass_s(self, seconds: float, *, beats: bool = True) -> str:
        for _ in range(int(seconds)):
            self.now += 1.0
            if beats:
                self.beat()
            if why := self.watch.look(self.now):
                return why
        return ""


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    return Ends(tmp_path)


def test_a_leader_that_was_stopped_is_noticed(ends: Ends) -> None:
    assert ends.pass_s(10_000) == ""
    assert ends.pass_s(SILENT_S / 2, beats=False) == ""
    assert "no sign of life" in ends.watch.late
    assert ends.pass_s(2) == ends.watch.late == ""
    assert "no sign of life" in ends.pass_s(SILENT_S + 5, beats=False)


def test_before_the_first_beat_and_after_the_last_nobody_is_judged(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    ends.pulse.stop()
    assert ends.pass_s(10_000, beats=False) == ""


def test_an_owner_that_was_stopped_itself_blames_nobody(ends: Ends) -> None:
    ends.pulse.begin(Activity.STEP, 100.0)
    ends.watch.look(ends.now)
    for _ in range(3):
        ends.now += 1e6
        assert ends.watch.look(ends.now) == ""


@pytest.mark.parametrize("what", list(Activity))
def test_what_takes_longer_than_it_may_ends_the_leader(ends: Ends, what: Activity) -> None:
    ends.pulse.begin(what, 40.0 if what else 0.0)
    assert ends.pass_s(20) == ""
    assert bool(ends.watch.late) == (what in (Activity.HOST, Activity.STEP))
    ends.pulse.begin(what, 40.0 if what else 0.0)
    assert ends.pass_s(30) == ""
    assert bool(ends.pass_s(20)) == bool(what)


class Probe(FakeExecutor):
    """Notes what the pulse says while it runs. fails: at its next step."""

    pulse: Pulse
    fails = False

    def __init__(self, config: EngineConfig, device: str) -> None:
        super().__init__(config)
        self.facts = msgspec.structs.replace(self.facts, device=device)
        self.noted: list[tuple[Activity, float]] = []

    def note(self) -> None:
        _, _, what, limit_ms = self.pulse._words
        self.noted.append((Activity(what), limit_ms / 1000))

    def launch(self, plan: Any) -> Any:
        self.note()
        if self.fails:
            raise OutOfMemory("no room", field="rank 0")
        return super().launch(plan)

    def mask(self, masks: Any) -> None:
        self.note()
        super().mask(masks)

    def handle(self, command: Any) -> Any:
        self.note()
        return super().handle(command)


def watched(tmp_path: Path, device: str) -> tuple[Leader, Probe]:
    config = fake_config(num_pages=4096)
    probe = Probe(config, device)
    probe.pulse = Pulse(pulse_path(tmp_path))
    return Leader(config, WatchedExecutor(probe, probe.pulse)), probe


def run(leader: Leader, rid: str, num_rows: int = 1, **sampling: Any) -> None:
    sampling.setdefault("max_new_tokens", 4)
    leader.submit([make_request(f"{rid}{i}", [i + 1, 2, 3], **sampling) for i in range(num_rows)])
    while leader.can_step():
        leader.step()


BUILD = (Activity.BUILD, watch_s(builds=True))
STEP = (Activity.STEP, watch_s(builds=False))


def test_the_first_step_of_a_kind_may_take_longer(tmp_path: Path) -> None:
    leader, probe = watched(tmp_path, "cuda")
    run(leader, "first")
    # The prompt, then rows without a new one among them.
    assert probe.noted[:3] == [BUILD, BUILD, STEP]
    probe.noted.clear()
    run(leader, "second")
    assert set(probe.noted) == {STEP}
    for changes in (
        {"frequency_penalty": 0.5},
        {"num_rows": 9},
        {"top_p": 0.5, "temperature": 0.7},
    ):
        probe.noted.clear()
        run(leader, str(changes), **changes)
        assert probe.noted[0] == BUILD
        probe.noted.clear()
        run(leader, "again", **changes)
        assert set(probe.noted) == {STEP}


def test_masks_may_take_as_long_as_the_launch_before_them(tmp_path: Path) -> None:
    leader, probe = watched(tmp_path, "cuda")
    run(leader, "plain")
    for noted in ([BUILD, BUILD], [STEP, STEP]):
        probe.noted.clear()
        masked = make_request("m", [1, 2, 3], max_new_tokens=4)
        leader.submit([msgspec.structs.replace(masked, allowed_token_ids=np.array([5], np.int32))])
        while leader.can_step():
            leader.step()
        # The launch of the prompt, its masks; the launch of the next step, its masks; ...
        assert len(probe.noted) == 8 and probe.noted[:2] == noted
        assert set(probe.noted[4:]) == {STEP}


def test_a_step_that_failed_was_not_built(tmp_path: Path) -> None:
    leader, probe = watched(tmp_path, "cuda")
    leader._overlap = False
    probe.fails = True
    run(leader, "fails")
    assert probe.noted == [BUILD]
    probe.fails = False
    run(leader, "again")
    assert probe.noted[1] == BUILD


def test_on_a_cpu_a_launch_is_the_step(tmp_path: Path) -> None:
    leader, probe = watched(tmp_path, "cpu")
    run(leader, "a")
    assert set(probe.noted) == {BUILD}


def test_commands_have_their_own_deadlines(tmp_path: Path) -> None:
    leader, probe = watched(tmp_path, "cpu")
    for command in (BeginUpdate(version=1), CheckWeights(action="checksum")):
        probe.noted.clear()
        leader.handle(command)
        assert probe.noted == [(Activity.COMMAND, deadlines(command).leader)]


class Hanging(FakeExecutor):
    """Its step lasts until the test has seen enough."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.entered, self.released = threading.Event(), threading.Event()

    def execute(self, plan: Any) -> Any:
        self.entered.set()
        assert self.released.wait(60)
        return super().execute(plan)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    executor = Hanging(fake_config())
    yield executor
    executor.released.set()


def test_a_step_that_hangs_is_noticed_while_the_process_lives(
    tmp_path: Path, hanging: Hanging
) -> None:
    ends = Ends(tmp_path)
    leader = Leader(fake_config(), WatchedExecutor(hanging, ends.pulse))
    thread = threading.Thread(target=run, args=(leader, "r"))
    thread.start()
    assert hanging.entered.wait(60)
    assert ends.pass_s(watch_s(builds=True) - 5) == ""
    assert "has been at a step that may build" in ends.pass_s(10)
    hanging.released.set()
    thread.join(60)
    ends.pulse.begin(Activity.WAITING)
    assert ends.pass_s(10_000) == ""


def test_the_beats_need_nothing_of_the_main_thread(tmp_path: Path) -> None:
    pulse = Pulse(pulse_path(tmp_path))
    pulse.start()
    first = pulse._words[0]
    deadline = threading.Event()
    for _ in range(600):
        if pulse._words[0] > first:
            break
        deadline.wait(0.1)
    assert pulse._words[0] > first > 0
    pulse.stop()
    assert pulse._words[0] == 0


def test_a_hang_is_noticed_long_before_a_reply_is_late() -> None:
    assert SILENT_S < watch_s(builds=False) < watch_s(builds=True) < REPLY_S < MAX_TIMEOUT_S
