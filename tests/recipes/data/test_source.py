"""Files and folders of data: formats by name, splits of folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import InvalidRequest
from recipes.data.source import choose_split, open_source


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"from": name}) + "\n")
    return folder


def saved(folder: Path, *, indices: list[dict[str, str]] | None = None, files: int = 2) -> Path:
    """A folder as `Dataset.save_to_disk` writes it, its Arrow files being empty."""
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    put(folder, *names)
    state = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "f", "_split": None}
    if indices is not None:
        state["_indices_data_files"] = indices
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["t.jsonl", "t.JSONL", "t.ndjson", "t.json", "t.csv"])
def test_one_file_is_one_split(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"q": 1}\n' if "csv" not in name else "q\n1\n")
    source = open_source(tmp_path / name, field="task")
    assert source.name == "t" and not source.is_split
    assert [str(r.columns["q"]) for r in source.rows("", field="task")] == ["1"]


def test_what_is_not_there_or_of_no_format(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no file at"):
        open_source(tmp_path / "none.jsonl", field="task")
    with pytest.raises(InvalidRequest, match=r"no known format.*parquet"):
        open_source(put(tmp_path, "t.xlsx") / "t.xlsx", field="task")


def test_names_of_files_say_their_splits(tmp_path: Path) -> None:
    put(tmp_path, "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl")
    put(tmp_path, "data/test-00000-of-00001.jsonl", "README.md", "dataset_infos.json")
    source = open_source(tmp_path, field="task")
    assert {k: [p.name for p in v] for k, v in source.splits.items()} == {
        "test": ["test-00000-of-00001.jsonl"],
        "train": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
    }
    found = [row.columns["from"] for row in source.rows("train", field="task")]
    assert found == [f"data/train-0000{i}-of-00002.jsonl" for i in range(2)]


def test_folders_named_as_splits_and_folders_without(tmp_path: Path) -> None:
    put(tmp_path / "a", "train/0.jsonl", "validation/0.jsonl", "train/1.jsonl")
    source = open_source(tmp_path / "a", field="task")
    assert {k: len(v) for k, v in source.splits.items()} == {"train": 2, "validation": 1}
    put(tmp_path / "b", "sums.jsonl", "latest.csv", "cache-1.arrow", ".hidden.jsonl")
    assert not open_source(tmp_path / "b", field="task").is_split
    assert len(open_source(tmp_path / "b", field="task").splits[""]) == 2


def test_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    put(tmp_path / "a", "main/train.jsonl", "socratic/train.jsonl")
    with pytest.raises(InvalidRequest, match="in its folders main, socratic; give one"):
        open_source(tmp_path / "a", field="task")
    put(tmp_path / "b", "train.jsonl", "sums.jsonl")
    with pytest.raises(InvalidRequest, match=r"sums\.jsonl has the name of no split"):
        open_source(tmp_path / "b", field="task")
    put(tmp_path / "c", "README.md")
    with pytest.raises(InvalidRequest, match="holds no data"):
        open_source(tmp_path / "c", field="task")


def test_data_sets_as_datasets_saves_them(tmp_path: Path) -> None:
    one = open_source(saved(tmp_path / "one"), field="task")
    assert [p.name for p in one.splits[""]] == [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    saved(tmp_path / "two" / "train")
    saved(tmp_path / "two" / "test", files=1)
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    two = open_source(tmp_path / "two", field="task")
    assert {k: len(v) for k, v in two.splits.items()} == {"train": 2, "test": 1}


def test_saved_data_sets_that_cannot_be_read(tmp_path: Path) -> None:
    chosen = saved(tmp_path / "a", indices=[{"filename": "indices.arrow"}])
    with pytest.raises(InvalidRequest, match="flatten_indices"):
        open_source(chosen, field="task")
    (saved(tmp_path / "b") / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(InvalidRequest, match=r"state\.json: cannot be read.*save the data set"):
        open_source(tmp_path / "b", field="task")
    for name in ("../data.arrow", "data.csv", ""):
        state = {"_data_files": [{"filename": name}]}
        (tmp_path / "b" / "state.json").write_text(json.dumps(state))
        with pytest.raises(InvalidRequest, match="no Arrow file of its folder"):
            open_source(tmp_path / "b", field="task")
    (put(tmp_path / "c") / "dataset_dict.json").parent.mkdir()
    (tmp_path / "c" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InvalidRequest, match=r"train/state\.json"):
        open_source(tmp_path / "c", field="task")
    (tmp_path / "c" / "dataset_dict.json").write_text('{"splits": []}')
    with pytest.raises(InvalidRequest, match="names no split"):
        open_source(tmp_path / "c", field="task")


def test_the_split_is_the_one_named_or_the_only_one_or_train(tmp_path: Path) -> None:
    def choose(wanted: str | None, *names: str) -> str:
        folder = tmp_path / "-".join(names)
        source = open_source(put(folder, *(f"{name}.jsonl" for name in names)), field="task")
        return choose_split(source, wanted, field="task", flag="train_split")

    assert choose(None, "train", "test") == "train"
    assert choose(None, "test") == "test"
    assert choose("test", "train", "test") == "test"
    assert choose(None, "rows") == ""
    with pytest.raises(InvalidRequest, match="splits dev, test; name one with --train-split"):
        choose(None, "dev", "test")
    with pytest.raises(InvalidRequest, match=r"no split 'val': .* has test, train") as caught:
        choose("val", "train", "test")
    assert caught.value.field == "train_split"
    with pytest.raises(InvalidRequest, match="has no splits with names"):
        choose("train", "rows")
