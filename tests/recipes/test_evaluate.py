"""The command that evaluates a model: figures as those of a run, and mistakes by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.evaluate import main
from tests.helpers.char_model import char_model, write_char_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]

WORDS = ["--device", "cpu", "--dtype", "float32", "--kv-memory-gb", "0.01"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that answers every sum with 7, and the end of the line."""
    folder = tmp_path_factory.mktemp("char_model")
    taught = char_model(16, 1)
    with torch.no_grad():
        taught.lm_head.weight.zero_()
    write_char_model(folder, taught)
    return str(folder)


def sums(folder: Path) -> str:
    path = folder / "sums.jsonl"
    lines = [json.dumps({"prompt": f"{a}+{a}=", "answer": 2 * a}) for a in range(6)]
    path.write_text("\n".join(lines))
    return str(path)


def test_a_table_and_json(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--eval-set", f"sums={sums(tmp_path)}", "--eval-set", f"again={sums(tmp_path)}"]
    words = ["--model", model, *sets, "--eval-samples", "2", "--max-new-tokens", "4", *WORDS]
    assert main(words) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert list(found["sets"]) == ["sums", "again"]
    for figures in found["sets"].values():
        assert figures["num_problems"] == 6
        assert {"accuracy", "pass@1", "pass@2", "avg@2", "avg@2/stderr"} <= figures.keys()
    assert "pass@2" in shown.err and "again" in shown.err
    out = tmp_path / "figures.json"
    assert main([*words, "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == found
    assert not capsys.readouterr().out


def unanswered(folder: Path) -> str:
    """Prompts without an answer, beside a column of the user's."""
    path = folder / "open.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{a}+1=", "worth": a}) for a in range(4)))
    return str(path)


def test_files_are_graded_by_the_rewards_and_generated_tasks_by_their_own(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = tmp_path / "mine.py"
    rewards.write_text(
        "def worth(reply, worth):\n    return 2.0 * worth\n\ndef one(reply):\n    return 1.0\n"
    )
    sets = ["--eval-set", f"open={unanswered(tmp_path)}", "--eval-set", "sums=addition"]
    given = ["--reward", f"{rewards}:worth", "--reward", f"{rewards}:one"]
    words = ["--model", model, *sets, *given, "--eval-prompts", "4", "--max-new-tokens", "2"]
    assert main([*words, *WORDS]) == 0
    shown = capsys.readouterr()
    (title,) = (line.split() for line in shown.err.splitlines() if "num_problems" in line)
    (row,) = (line.split() for line in shown.err.splitlines() if "open" in line)
    assert title[:3] == ["set", "num_problems", "reward"] and "accuracy" in title
    assert row[:3] == ["open", "4", "4.000"]
    found = json.loads(shown.out)["sets"]
    assert found["open"]["accuracy"] == 4.0 and found["open"]["num_failed"] == 0
    assert found["sums"]["accuracy"] == 0.0


def test_a_file_without_answers_takes_a_reward(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--eval-set", f"open={unanswered(tmp_path)}"]
    assert main(["--model", model, *sets, *WORDS]) == 2
    assert "open.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,field",
    [
        ([], "eval_set"),
        (["--eval-set", "a=addition", "--reward", "tests.helpers.odd_graders:grade"], "reward"),
        (["--eval-set", "a=addition", "--reward", "nothing"], "reward"),
        (["--eval-set", "a=addition", "--judge-model", "m"], "judge_model"),
        (["--eval-set", "a=addition", "--code-seconds", "9"], "code_seconds"),
        (["--eval-set", "a=addition", "--reward-label", "1"], "reward_label"),
        (["--eval-set", "a=addition", "--reward-timeout", "0"], "reward_timeout"),
        (["--eval-set", "a=addition", "--eval-temperature", "0.5"], "eval_temperature"),
        (["--eval-set", "a=none"], "eval_set"),
        (["--eval-set", "a=addition", "--eval-samples", "2", "--eval-k", "3"], "eval_k"),
        (["--eval-set", "a=addition", "--eval-prompts", "0"], "eval_prompts"),
        (["--eval-set", "a=addition", "--eval-temperature", "nan"], "eval_temperature"),
        (["--eval-set", "a=addition", "--out", "no/such/folder/x.json"], "out"),
    ],
)
def test_mistakes_are_a_line_with_the_flag(
    words: list[str], field: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", model, *words, *WORDS]) == 2
    assert f"({field}): " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--heldout", "--train-split", "--max-failed-share"])
def test_nothing_is_trained_so_no_flag_of_training_is_there(
    flag: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--model", model, "--eval-set", "a=addition", flag, "0.25", *WORDS])
    assert flag in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "no/such", "--eval-set", "a=addition", *WORDS]) == 2
    assert "ModelNotFound (model): " in capsys.readouterr().err
