import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import rollout.__main__ as cli
from engine.config import EngineConfig
from engine.errors import EngineDead
from rollout.cli.flag_ranges import RANGES
from rollout.cli.serve_flags import Serve, serve_config
from rollout.http.config import ServeConfig
from rollout.replica.base import Replica
from rollout.text.tokenizer import find_tokenizer
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.replicas import inline, spawned
from tests.helpers.tiny_tokenizer import ids_of, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ["offline", "--model", "m", "--input", "i", "--output", "o"]


def offline(folder: Path, *more: str) -> int:
    """Answer the file `in` of a model's folder into `out`; the exit code."""
    args = ["offline", "--model", str(folder), "--input", str(folder / "in")]
    try:
        cli.main([*args, "--output", str(folder / "out"), *more])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
    return 0


def test_the_options_are_these() -> None:
    names = [field.name for field in dataclasses.fields(cli.Offline)]
    assert names == [
        "model", "input", "output", "load_format", "device", "dtype", "context_length",
        "attention", "max_running", "kv_memory", "page_size", "prefix_cache", "seed", "spawn",
        "served_model_name",
    ]  # fmt: skip


def test_the_options_of_serve_are_these() -> None:
    names = [field.name for field in dataclasses.fields(Serve)]
    assert names == [
        "model", "tp", "host", "port", "served_model_name", "api_key", "admin_api_key",
        "load_format", "device", "dtype", "context_length", "attention", "cuda_graphs",
        "capture_at_start",
        "max_running", "max_waiting", "max_samples",
        "trust_request_chat_template", "kv_memory", "mem_fraction", "page_size", "prefix_cache",
        "enable_memory_saver", "enable_weights_cpu_backup", "trainer_memory",
        "trainer_training_memory", "reserve_shadow",
        "base_gpu", "weight_version", "seed", "replica_id", "incremental_streaming_output",
        "max_body_mib", "max_control_body_mib", "max_held_body_mib", "restart",
        "allowed_host", "allowed_origin",
        "weights_root", "rendezvous_host", "profile_root", "receive_timeout_s",
    ]  # fmt: skip


def test_options_of_serve_reach_the_configuration() -> None:
    assert serve_config(Serve(model="m")) == ServeConfig(engine=EngineConfig(model="m"))
    args = cli.parse(
        ["serve", "--model", "m", "--tp", "2", "--kv-memory", "0.5", "--enable-memory-saver",
         "--admin-api-key", "a", "--max-body-mib", "1", "--trainer-memory", "2",
         "--restart", "on-failure", "--weights-root", "/a", "--weights-root", "/b"]
    )  # fmt: skip
    assert isinstance(args, Serve)
    config = serve_config(args)
    assert config.engine.parallel.tp_size == 2
    assert config.engine.cache.memory_bytes == 1 << 29
    assert config.engine.memory.saver
    assert config.engine.memory.trainer_bytes == 2 << 30
    assert (config.admin_api_key, config.max_body_bytes) == ("a", 1 << 20)
    assert config.model_name == "m"
    assert (config.restart, config.weights_roots) == ("on-failure", ("/a", "/b"))


NUMBERS = [
    ("--tp", "0"),
    ("--port", "70000"),
    ("--kv-memory", "0"),
    ("--kv-memory", "nan"),
    ("--kv-memory", "inf"),
    ("--mem-fraction", "1.5"),
    ("--trainer-memory", "-1.0"),
    ("--base-gpu", "-1"),
    ("--weight-version", "-1"),
    ("--weight-version", str(2**53 + 1)),
    ("--seed", str(2**63)),
    ("--context-length", str(2**31)),
    ("--receive-timeout-s", "nan"),
]


@pytest.mark.parametrize("command", [Serve, cli.Offline])
def test_every_number_has_a_range(command: type) -> None:
    some = (int, float, int | None, float | None)
    numbers = {name for name, kind in get_type_hints(command).items() if kind in some}
    assert numbers <= set(RANGES)
    for name in numbers:
        assert RANGES[name].holds(getattr(command, name) or RANGES[name].most), name


@pytest.mark.parametrize("option,value", NUMBERS)
def test_a_value_of_serve_without_a_meaning_names_its_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--model", "m", option, value])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"InvalidRequest ({option}): is {value}")


def test_options_reach_the_configuration() -> None:
    args = cli.parse([*REQUIRED, "--kv-memory", "0.5", "--max-running", "7", "--device", "cpu"])
    config = cli.engine_config(args)
    assert config.model == "m"
    assert config.device == "cpu"
    assert config.cache.memory_bytes == 1 << 29
    assert config.scheduler.max_running == 7
    assert not args.spawn
    assert cli.engine_config(cli.parse(REQUIRED)) == EngineConfig(model="m")


def test_help_explains_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["offline", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(cli.Offline):
        assert f"--{field.name.replace('_', '-')}" in text


def test_help_without_torch() -> None:
    code = (
        "import sys, rollout.__main__ as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "offline" in done.stdout


def test_offline_answers_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_launch(config: EngineConfig, *, process: bool) -> Replica:
        assert (config.seed, process) == (3, False)
        return inline()

    monkeypatch.setattr(cli, "launch", fake_launch)
    tiny_tokenizer().write_hf(tmp_path)
    (tmp_path / "in").write_text('{"text": "abc", "sampling_params": {"max_new_tokens": 4}}\n')
    cli.main(
        ["offline", "--model", str(tmp_path), "--input", str(tmp_path / "in"), "--output",
         str(tmp_path / "out"), "--seed", "3"]
    )  # fmt: skip
    reply = json.loads((tmp_path / "out").read_text())
    assert reply["output_ids"] == expected_tokens(ids_of("abc"), 4)


def test_a_missing_model_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").touch()
    args = ["offline", "--model", str(tmp_path / "absent")]
    args += ["--input", str(tmp_path / "in"), "--output", "o"]
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("ModelNotFound (model): no model at")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "option", ["--max-running", "--kv-memory", "--page-size", "--context-length"]
)
def test_a_value_without_a_meaning_names_its_option(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*REQUIRED, option, "0"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"InvalidRequest ({option}): is 0")


def test_a_missing_input_is_noticed_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(cli, "launch")
    with pytest.raises(SystemExit):
        cli.main(REQUIRED)
    assert "InvalidRequest (--input)" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["in.jsonl", ".", "no/out.jsonl"])
def test_an_output_is_refused_before_the_model_is_loaded(
    output: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(cli, "launch")
    (tmp_path / "in.jsonl").write_text("{}\n")
    args = ["offline", "--model", "m", "--input", str(tmp_path / "in.jsonl")]
    with pytest.raises(SystemExit) as caught:
        cli.main([*args, "--output", str(tmp_path / output)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("InvalidRequest (--output): --output: ")


def test_a_dead_engine_is_exit_code_1_and_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(args: object) -> None:
        raise EngineDead("leader process 7 exited with code 1: KeyError: 0", field="leader")

    monkeypatch.setattr(cli, "run_offline", dies)
    with pytest.raises(SystemExit) as caught:
        cli.main(REQUIRED)
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("EngineDead (leader): leader process 7 exited")


def test_an_interrupt_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_offline", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(REQUIRED)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_config_alone_needs_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_tokenizer(tmp_path / "config.json") is None


def test_an_input_that_is_no_text_is_noticed_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(cli, "launch")
    (tmp_path / "in").write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(SystemExit):
        cli.main(["offline", "--model", "m", "--input", str(tmp_path / "in"), "--output", "o"])
    assert "is UTF-16; save it as UTF-8" in capsys.readouterr().err


def test_offline_serves_ids_of_a_folder_without_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `serve` does: the folder is a model, and ids need no tokenizer."""
    monkeypatch.setattr(cli, "launch", lambda config, process: inline())
    (tmp_path / "config.json").write_text("{}")
    lines = [{"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 4}}, {"text": "abc"}]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert offline(tmp_path) == 3
    reply, refusal = [json.loads(line) for line in (tmp_path / "out").read_text().split("\n")[:-1]]
    assert reply["output_ids"] == expected_tokens([1, 2], 4)
    assert "input_ids" in refusal["error"]["message"]


@pytest.mark.parametrize(
    "lines,code,told",
    [
        ([{"input_ids": [1]}], 0, ""),
        ([], 0, ""),
        ([{"text": "a"}, {"input_ids": [4000]}], 1, "2 of 2 lines failed; "),
        ([{"input_ids": [4000]}, {"input_ids": [1]}], 3, "1 of 2 lines failed; "),
    ],
)
def test_the_exit_code_says_whether_lines_failed(
    lines: list[Any],
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "launch", lambda config, process: inline())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert offline(tmp_path) == code
    error = capsys.readouterr().err
    assert error.startswith(told) and (str(tmp_path / "out") in error) == bool(told)
    assert len((tmp_path / "out").read_text().splitlines()) == len(lines)


def test_batch_lines_are_answered_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_launch(config: EngineConfig, *, process: bool) -> Replica:
        assert process
        return spawned()

    monkeypatch.setattr(cli, "launch", fake_launch)
    tiny_tokenizer().write_hf(tmp_path)
    body = {"model": "mine", "prompt": "abc", "max_tokens": 4, "return_token_ids": True}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in").write_text(json.dumps(line) + "\n")
    assert offline(tmp_path, "--served-model-name", "mine") == 0
    reply = json.loads((tmp_path / "out").read_text())
    assert (reply["custom_id"], reply["error"]) == ("a", None)
    assert reply["response"]["body"]["choices"][0]["token_ids"] == expected_tokens(ids_of("abc"), 4)


def test_offline_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text("{}\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(
            ["offline", "--model", str(tmp_path / "none"), "--input", str(tmp_path / "in"),
             "--output", str(tmp_path / "out")]
        )  # fmt: skip
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("ModelNotFound")
