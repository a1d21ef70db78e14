"""A page of curves from the rows of a run, whatever is in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from recipes.run.plots import Curves, draw, draw_page, main, points, read_curves

NAN, INFINITE = math.nan, math.inf


def row(step: int, **figures: Any) -> dict[str, Any]:
    return {
        "step": step,
        "reward": step / 10,
        "entropy": 1.0,
        "sampling/sampling_logp_difference/mean": 1e-3,
        "rollout_corr/k3_kl": 1e-6,
        "completions/mean_length": 5.0,
        "timing_s/generate": 1.0,
        "timing_s/train": 2.0,
        "timing_s/step": 3.0,
        **figures,
    }


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(each) + "\n" for each in rows)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def is_picture(data: bytes) -> bool:
    return data.startswith(b"\x89PNG") and len(data) > 10_000


def test_only_finite_numbers_are_points() -> None:
    values = [0.5, NAN, INFINITE, None, "high", True, [1], 10**400, 0.0, -1]
    rows = [{"step": i, "x": value} for i, value in enumerate(values)]
    rows += [{"x": 1.0}, {"step": "two", "x": 1.0}, {"step": 20}]
    assert points(rows, "x") == ([0, 8, 9], [0.5, 0.0, -1.0])
    assert points(rows, "x", log=True) == ([0], [0.5])
    assert points([], "x") == ([], [])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(1)],
        [row(1), row(2, **{"eval/accuracy": 0.5}), row(3)],
        [row(step, reward=NAN, entropy=NAN) for step in range(1, 4)],
        [row(1, **{"timing_s/train": NAN}), row(2, **{"timing_s/train": None})],
        [row(1, **{"sampling/sampling_logp_difference/mean": 0.0, "rollout_corr/k3_kl": -1e-9})],
        [{"step": 1}, {"loss": 2.0}, {"step": NAN, "timing_s/train": 1.0}],
        [row(2), row(1), row(1)],
        [row(1, reward=1e308), row(2, reward=-1e308)],
    ],
)
def test_every_kind_of_rows_is_a_page(rows: list[dict[str, Any]]) -> None:
    assert is_picture(draw([Curves(name="$a run_", rows=rows)]))
    assert is_picture(draw([Curves(name="$x^$", rows=rows), Curves(name="b", rows=[])]))


def test_evaluations_before_training_are_drawn_where_they_are_known(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row(1), row(2, **{"eval/accuracy": 0.5})])
    without = draw([read_curves(folder)])
    (folder / "evaluations.jsonl").write_text(
        '{"step": 0, "eval/accuracy": 0.1}\n{"step": 2, "eval/accuracy": 0.5}\n'
    )
    curves = read_curves(folder)
    assert [each["step"] for each in curves.evaluations] == [0, 2]
    assert draw([curves]) != without


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row(1, reward=NAN), row(2)])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n\xff\xfe\n{"step": 3, "rew')
    assert [each["step"] for each in read_curves(folder).rows] == [1, 2]
    draw_page(folder)
    assert is_picture((folder / "plots.png").read_bytes())
    draw_page(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    runs = [write(tmp_path / name, [row(i) for i in range(1, 5)]) for name in ("one", "two")]
    assert main([str(run) for run in runs]) == 0
    both = (runs[0] / "plots.png").read_bytes()
    out = tmp_path / "page.png"
    assert main([str(runs[1]), "--out", str(out)]) == 0
    assert is_picture(both) and is_picture(out.read_bytes()) and both != out.read_bytes()


def test_a_folder_without_metrics_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"there is no {tmp_path}/metrics.jsonl" in capsys.readouterr().err
    folder = write(tmp_path / "run", [row(1)])
    assert main([str(folder), "--out", str(tmp_path / "no" / "x.png")]) == 2
    assert "(out)" in capsys.readouterr().err
