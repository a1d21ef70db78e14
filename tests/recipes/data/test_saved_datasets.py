"""Folders that the `datasets` package saves, read without it; written by it where it is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow")

from recipes.data.data_options import DataOptions  # noqa: E402
from recipes.environments.file_task import load_task  # noqa: E402

VERL = DataOptions(answer_column="reward_model.ground_truth", heldout="test")


def verl_rows(first: int, num: int) -> list[dict[str, Any]]:
    """Rows as verl's examples write them."""
    return [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{i}+1="}],
            "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(first, first + num)
    ]


def save(folder: Path, rows: list[dict[str, Any]], files: int) -> None:
    """As `Dataset.save_to_disk`: Arrow streams, and the names of their files."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    for index, name in enumerate(names):
        table = pa.Table.from_pylist(rows[index::files])
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as stream,
        ):
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


def assert_is_the_task(path: Path) -> None:
    task = load_task(path, VERL)
    assert (task.count("train"), task.count("heldout")) == (20, 3)
    found = {task.at("train", i).question: task.at("train", i) for i in range(20)}
    problem = found["7+1="]
    assert (problem.answer, problem.chat) == ("8", ())
    assert problem.columns["extra_info"] == {"index": 7, "split": "train"}
    assert problem.columns["reward_model"]["style"] == "rule"


def test_a_saved_dict_of_splits(tmp_path: Path) -> None:
    save(tmp_path / "train", verl_rows(0, 20), files=3)
    save(tmp_path / "test", verl_rows(50, 3), files=1)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert_is_the_task(tmp_path)


def test_what_the_package_itself_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": verl_rows(0, 20), "test": verl_rows(50, 3)}
    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    assert_is_the_task(tmp_path / "saved")
    for name, data in made.items():
        data.to_parquet(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    assert_is_the_task(tmp_path / "hub")
