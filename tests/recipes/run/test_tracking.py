"""wandb is imported only when it is asked for."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.protocol import VersionSpan
from recipes.run.tracking import TABLE_ROWS, Tracker
from tests.helpers.trajectories import random_groups


@pytest.mark.slow
def test_off_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import recipes.grpo\n"
        "from recipes.run.tracking import Tracker\n"
        "t = Tracker('off', Path('x'), {}); t.log({'step': 1}); t.close({})\n"
        "assert 'wandb' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.summary: dict[str, Any] = {}
        self.finished = False

    def log(self, row: dict[str, Any], step: int) -> None:
        self.logged.append((row, step))

    def finish(self) -> None:
        self.finished = True


def test_rows_go_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = FakeRun(), {}

    def init(**arguments: Any) -> FakeRun:
        asked.update(arguments)
        return run

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = Tracker("offline", tmp_path, {"lr": 1})
    tracker.log({"step": 3, "reward": 0.5})
    tracker.close({"eval_after": 0.9})
    assert (asked["mode"], asked["config"]) == ("offline", {"lr": 1})
    assert run.logged == [({"step": 3, "reward": 0.5}, 3)]
    assert run.summary == {"eval_after": 0.9} and run.finished


def test_rollouts_are_a_table_of_bounded_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
            self.columns, self.data = columns, data

    run = FakeRun()
    module = ModuleType("wandb")
    module.init = lambda **_: run  # type: ignore[attr-defined]
    module.Table = Table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    (group,) = random_groups(1, 50, vocab=5)
    first = dataclasses.replace(
        group.trajectories[0],
        text="46",
        failed="too slow",
        spans=(VersionSpan(3, 0, 1), VersionSpan(5, 1, 2)),
    )
    group = dataclasses.replace(group, trajectories=(first, *group.trajectories[1:]))
    Tracker("offline", tmp_path, {}).log_rollouts(6, [group, group])
    ((logged, step),) = run.logged
    table = logged["rollouts"]
    assert (step, len(table.data)) == (6, TABLE_ROWS)
    assert dict(zip(table.columns, table.data[0], strict=True)) == {
        "step": 6,
        "prompt": "",
        "reply": "46",
        "reward": None,
        "failure": "too slow",
        "age": 2,
        "versions": 2,
    }
    Tracker("off", tmp_path, {}).log_rollouts(6, [group])


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InvalidRequest, match=r"\.\[wandb\]"):
        Tracker("online", tmp_path, {})
