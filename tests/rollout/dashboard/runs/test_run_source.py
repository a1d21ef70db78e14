"""A run's folder as a source of the page: live, finished, half written, or no run at all."""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
from pathlib import Path

import msgspec
import pytest

from engine.errors import InvalidRequest
from recipes.run.run_folder import RunFolder
from rollout.dashboard.figures import Snapshot
from rollout.dashboard.live import LiveQuery, behind, look
from rollout.dashboard.rollouts import RolloutQuery
from rollout.dashboard.runs.run_charts import charts_of
from rollout.dashboard.runs.run_source import RunSource
from tests.helpers.run_folders import row_of, run_folder, write_steps


class Clock:
    """Every look is later than any period."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


def source_of(path: Path) -> RunSource:
    return RunSource(path, clock=Clock())


def test_a_run_that_goes_on_is_followed(tmp_path: Path) -> None:
    asyncio.run(_followed(tmp_path))


async def _followed(path: Path) -> None:
    folder = run_folder(path)
    assert folder.claim()
    source = source_of(path)
    first = await look(source, LiveQuery())
    assert (first.snapshot.state, first.snapshot.model) == ("training", "tiny.gguf")
    assert first.series.x == [0, 1, 2, 3]
    assert first.series.columns["reward"] == [None, 0.1, 0.2, 0.3]
    assert first.series.columns["eval/accuracy"] == [0.25, None, None, None]
    assert {f.name: f.value for f in first.snapshot.figures}["step"] == "3 of 10"
    (ledger,) = (chart for chart in first.snapshot.charts if chart.stacked)
    assert [line.label for line in ledger.lines] == ["generate", "train"]
    assert [event.version for event in first.events.events] == ["", "1", "2", "3"]
    moments = [event.at for event in first.events.events]
    assert moments[-1] - moments[1] == pytest.approx(6.0)
    write_steps(folder, range(4, 5))
    folder.append_metrics(row_of(5, reward=math.nan, entropy=0.5))
    second = await look(source, behind(first))
    assert (second.series.first, second.series.x) == (4, [4, 5])
    assert second.series.columns["reward"] == [0.4, None]
    assert second.series.columns["entropy"] == [None, 0.5]
    assert {f.name: f.value for f in second.snapshot.figures}["reward"] == "NaN"
    assert [event.version for event in second.events.events] == ["4", "5"]
    assert (await source.rollouts(RolloutQuery(limit=1))).total == 4 * 8
    folder.truncate(2)
    third = await look(source, behind(second))
    fourth = await look(source, behind(third))
    assert fourth.epoch != second.epoch
    assert fourth.series.x == [0, 1, 2] and fourth.series.first == 0
    folder.write_summary({})
    folder.close()
    assert (await source.snapshot()).state == "finished"
    source.close()


def snapshot(path: Path) -> Snapshot:
    return asyncio.run(source_of(path).snapshot())


def test_a_folder_without_some_files_opens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"task": "larg')
    told = snapshot(tmp_path)
    assert told.state == "stopped" and told.charts == [] and told.rollouts
    assert [figure.value for figure in told.figures] == ["0"]
    series = asyncio.run(source_of(tmp_path).series(0))
    assert series.x == [] and series.next == 0


def test_the_lock_of_a_run_is_looked_up_and_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config({"train_on": "assistant"})
    with (tmp_path / ".lock").open("w") as lock:
        assert snapshot(tmp_path).state == "stopped"
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = snapshot(tmp_path)
        assert told.state == "starting"
        assert told.rollouts == "A supervised run samples no replies."
    assert snapshot(tmp_path).state == "stopped"


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, told in (
        (tmp_path, "no folder of a run"),
        (tmp_path / "gone", "not there"),
        (tmp_path / "file", "is no folder"),
    ):
        with pytest.raises(InvalidRequest, match=told) as caught:
            RunSource(path)
        assert caught.value.field == "run" and str(path) in caught.value.message


def test_a_file_that_cannot_be_read_is_told_and_asked_for_again(tmp_path: Path) -> None:
    run_folder(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.rename(tmp_path / "kept")
    os.mkfifo(metrics)
    source = source_of(tmp_path)
    with pytest.raises(InvalidRequest, match=r"metrics\.jsonl"):
        asyncio.run(source.snapshot())
    metrics.unlink()
    (tmp_path / "kept").rename(metrics)
    assert len(asyncio.run(source.series(0)).x) == 4


def test_a_long_run_comes_page_by_page(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = (msgspec.json.encode(row_of(step)) for step in range(1, 4501))
    path.write_bytes(b"\n".join(rows) + b"\n")
    source = source_of(tmp_path)

    async def read() -> list[float]:
        query, steps = LiveQuery(epoch=source.epoch), []
        while True:
            message = await look(source, query)
            steps += message.series.x
            assert len(message.series.x) <= 2000
            if not (message.series.more or message.events.more):
                return steps
            query = behind(message)

    assert asyncio.run(read()) == list(range(1, 4501))


def test_charts_draw_what_there_is() -> None:
    columns = [
        *("async/staleness_mean", "async/lag_share/10", "async/lag_share/2", "rollout_corr/kl"),
        *("rollout_corr/k3_kl", "eval/a/accuracy", "eval/heldout/accuracy"),
        "eval/a/accuracy/stderr",
    ]
    charts = {chart.name: [line.label for line in chart.lines] for chart in charts_of(columns)}
    assert charts == {
        "sets": ["a accuracy", "heldout accuracy"],
        "mismatch": ["k3"],
        "mismatch_k1": ["k1"],
        "staleness": ["token, mean"],
        "lags": ["2 behind", "10 behind"],
    }


def test_options_that_are_no_file_keep_nobody_waiting(tmp_path: Path) -> None:
    folder = run_folder(tmp_path).path
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert snapshot(folder).title == folder.name
