"""The one line of a command that ends by an error."""

from __future__ import annotations

import errno
import re
import tomllib
from pathlib import Path

import pytest
import safetensors
import torch

from engine import errors
from rollout.cli.failures import EXTRAS, explain, report

ADVICE = {"OutOfMemory": "take less", "WeightUpdateError": "push again"}


def line_of(error: BaseException) -> tuple[str, int]:
    found = explain(error, ADVICE)
    assert found is not None
    assert found[1] != 0
    return found


def test_errors_of_the_tree_with_what_a_command_knows() -> None:
    assert line_of(errors.InvalidRequest("is 0; give 1", field="--tp")) == (
        "InvalidRequest (--tp): is 0; give 1",
        2,
    )
    assert line_of(errors.InvalidRequest("steps is 0", field="steps"))[0] == (
        "InvalidRequest (steps): steps is 0"
    )
    assert line_of(errors.OutOfMemory("no"))[0] == "OutOfMemory: no; take less"
    assert line_of(errors.GroupError("gone"))[0] == "GroupError: gone; push again"
    assert line_of(errors.EngineDead("rank 1 died")) == ("EngineDead: rank 1 died", 1)
    assert line_of(KeyboardInterrupt()) == ("interrupted", 130)


@pytest.mark.parametrize(
    "error,told",
    [
        (MemoryError(), "memory is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmuch more text"), "GPU's memory"),
        (torch.distributed.DistStoreError("timed out"), "MASTER_ADDR"),
        (torch.distributed.DistNetworkError("refused"), "MASTER_PORT"),
        (torch.distributed.DistBackendError("NCCL error"), "its own last line"),
        (safetensors.SafetensorError("header too small"), "copy the model again"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (RuntimeError("unexpected pos 64 vs 0"), "disk is full"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/b"), "/a/b: No such file; check"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "who may use it"),
        (ModuleNotFoundError("no", name="deepspeed.ops"), r"pip install -e '.[train]'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_others_that_a_user_can_mend(error: Exception, told: str) -> None:
    line, code = line_of(error)
    assert told in line and "\n" not in line
    assert line.startswith(type(error).__name__)
    assert code == 1


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("shape"), OSError("?"), ModuleNotFoundError(name="ours")]
)
def test_what_nobody_expected_keeps_its_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error, advice=ADVICE, then="go on") is None
    assert capsys.readouterr().err == ""


def test_how_to_go_on_ends_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report(errors.QueueFull("full"), advice={}, then="continue with --resume r") == 2
    assert capsys.readouterr().err == "QueueFull: full; continue with --resume r\n"
    monkeypatch.setenv("SLIPSTREAM_TRACEBACK", "1")
    try:
        raise errors.QueueFull("full")
    except errors.QueueFull as error:
        assert report(error, advice={}) == 2
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and told.endswith("QueueFull: full\n")


ROOT = Path(__file__).resolve().parents[3]


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*EXTRAS.values(), "dev", "clients", "browser"} == set(project["optional-dependencies"])


@pytest.mark.parametrize("module", EXTRAS)
def test_what_an_extra_brings_is_imported(module: str) -> None:
    imported = re.compile(rf"(import|from) {module}\b|\"{module}[\".]")
    packages = ("engine", "kernels", "rollout", "recipes", "trainer_bridge")
    files = [path for name in packages for path in (ROOT / name).rglob("*.py")]
    assert any(imported.search(path.read_text()) for path in files if path.name != "failures.py")
