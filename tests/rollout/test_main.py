"""The command line of `serve` and `offline`: its options, their ranges, what they set."""

import dataclasses
import json
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import pytest

import rollout.__main__ as cli
from engine.config import EngineConfig
from engine.errors import EngineDead
from rollout.cli.flag_ranges import (
    ENGINE_RANGES,
    ROUTER_RANGES,
    SERVE_RANGES,
    check_router,
    check_serve,
)
from rollout.http.config import ServeConfig
from rollout.replica.base import Replica
from rollout.router.config import RouterConfig
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


ENGINE: dict[str, tuple[list[str], str, object]] = {
    "model": (["m"], "model", "m"),
    "load-format": (["random"], "load_format", "random"),
    "device": (["cpu"], "device", "cpu"),
    "dtype": (["float16"], "dtype", "float16"),
    "context-length": (["99"], "context_length", 99),
    "quantization": (["int8"], "quantization", "int8"),
    "attention": (["triton"], "attention", "triton"),
    "cuda-graphs": ([], "cuda_graphs", True),
    "no-cuda-graphs": ([], "cuda_graphs", False),
    "capture-at-start": ([], "capture_at_start", True),
    "seed": (["-5"], "seed", -5),
    "weight-version": (["7"], "weight_version", 7),
    "page-size": (["8"], "cache.page_size", 8),
    "kv-memory": (["0.5"], "cache.memory_bytes", 1 << 29),
    "mem-fraction": (["0.25"], "cache.memory_fraction", 0.25),
    "no-prefix-cache": ([], "cache.prefix_cache", False),
    "kv-dtype": (["fp8_e4m3"], "cache.kv_dtype", "fp8_e4m3"),
    "kv-scales": (["checkpoint"], "cache.kv_scales", "checkpoint"),
    "max-running": (["7"], "scheduler.max_running", 7),
    "max-waiting": (["8"], "scheduler.max_waiting", 8),
    "max-samples": (["9"], "scheduler.max_samples", 9),
    "max-sessions": (["9"], "sessions.max_sessions", 9),
    "session-timeout-s": (["2.5"], "sessions.session_timeout_s", 2.5),
    "max-rollouts": (["8"], "sessions.max_rollouts", 8),
    "rollout-timeout-s": (["1.5"], "sessions.rollout_timeout_s", 1.5),
    "tp": (["2"], "parallel.tp_size", 2),
    "dp": (["2"], "parallel.dp_size", 2),
    "ep": ([], "parallel.ep", True),
    "base-gpu": (["3"], "parallel.base_gpu", 3),
    "enable-memory-saver": ([], "memory.saver", True),
    "enable-weights-cpu-backup": ([], "memory.cpu_backup", True),
    "trainer-memory": (["2"], "memory.trainer_bytes", 2 << 30),
    "trainer-training-memory": (["0.5"], "memory.trainer_training_bytes", 1 << 29),
    "reserve-shadow": ([], "memory.reserve_shadow", True),
    "numerics": (["invariant"], "numerics", "invariant"),
    "enable-return-routed-experts": ([], "return_routed_experts", True),
    "speculative": (["ngram"], "speculative.method", "ngram"),
    "draft-tokens": (["7"], "speculative.draft_tokens", 7),
    "allow-forced-acceptance": ([], "speculative.allow_forced_acceptance", True),
}
"""Every option of an engine: what may follow it, and the field of the configuration it sets."""

SERVE: dict[str, tuple[list[str], str, object]] = {
    "host": (["h"], "host", "h"),
    "port": (["0"], "port", 0),
    "served-model-name": (["n"], "served_model_name", "n"),
    "api-key": (["k"], "api_key", "k"),
    "admin-api-key": (["a"], "admin_api_key", "a"),
    "trust-request-chat-template": ([], "trust_request_chat_template", True),
    "replica-id": (["r"], "replica_id", "r"),
    "incremental-streaming-output": ([], "incremental_streaming_output", True),
    "tool-parser": (["hermes"], "tool_parser", "hermes"),
    "reasoning-parser": (["none"], "reasoning_parser", "none"),
    "rerank-form": (["list"], "rerank_form", "list"),
    "max-body-mib": (["1"], "max_body_bytes", 1 << 20),
    "max-control-body-mib": (["2"], "max_control_body_bytes", 2 << 20),
    "max-held-body-mib": (["3"], "max_held_body_bytes", 3 << 20),
    "restart": (["on-failure"], "restart", "on-failure"),
    "allowed-host": (["a", "--allowed-host", "b"], "allowed_hosts", ("a", "b")),
    "allowed-origin": (["a", "--allowed-origin", "b"], "allowed_origins", ("a", "b")),
    "weights-root": (["/a", "--weights-root", "/b"], "weights_roots", ("/a", "/b")),
    "rendezvous-host": (["a", "--rendezvous-host", "b"], "rendezvous_hosts", ("a", "b")),
    "profile-root": (["/p"], "profile_root", "/p"),
    "receive-timeout-s": (["2.5"], "receive_timeout_s", 2.5),
    "send-timeout-s": (["3.5"], "send_timeout_s", 3.5),
    "http-processes": (["4"], "http_processes", 4),
    "request-timeout-s": (["5"], "request_timeout_s", 5.0),
    "max-request-timeout-s": (["6"], "max_request_timeout_s", 6.0),
    "drain-timeout-s": (["7"], "drain_timeout_s", 7.0),
    "stuck-step-s": (["8"], "stuck_step_s", 8.0),
    "log-format": (["json"], "log_format", "json"),
    "log-level": (["debug"], "log_level", "debug"),
    "access-log": ([], "access_log", True),
    "otel": ([], "otel", True),
    "router": (["http://h:1"], "router", "http://h:1"),
}

ROUTER: dict[str, tuple[list[str], str, object]] = {
    "host": (["h"], "host", "h"),
    "port": (["0"], "port", 0),
    "worker": (["http://a:1", "--worker", "http://b:2"], "workers", ("http://a:1", "http://b:2")),
    "policy": (["least_load"], "policy", "least_load"),
    "no-journal": ([], "journal", False),
    "api-key": (["k"], "api_key", "k"),
    "admin-api-key": (["a"], "admin_api_key", "a"),
    "worker-api-key": (["w"], "worker_api_key", "w"),
    "worker-admin-api-key": (["x"], "worker_admin_api_key", "x"),
    "allowed-host": (["a", "--allowed-host", "b"], "allowed_hosts", ("a", "b")),
    "allowed-origin": (["a", "--allowed-origin", "b"], "allowed_origins", ("a", "b")),
    "max-body-mib": (["1"], "max_body_bytes", 1 << 20),
    "max-control-body-mib": (["2"], "max_control_body_bytes", 2 << 20),
    "max-held-body-mib": (["3"], "max_held_body_bytes", 3 << 20),
    "receive-timeout-s": (["2.5"], "receive_timeout_s", 2.5),
    "send-timeout-s": (["3.5"], "send_timeout_s", 3.5),
    "silence-s": (["4.5"], "silence_s", 4.5),
    "patience-s": (["5.5"], "patience_s", 5.5),
    "log-format": (["json"], "log_format", "json"),
    "log-level": (["debug"], "log_level", "debug"),
}


@pytest.mark.parametrize("command", ["offline", "serve", "router"])
def test_the_options_are_these(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    found = set(re.findall(r"--([a-z][a-z-]*[a-z])\b(?!-)", capsys.readouterr().out))
    wanted = {
        "offline": {*ENGINE, "prefix-cache", "input", "output", "spawn", "served-model-name"},
        "serve": {*ENGINE, "prefix-cache", *SERVE},
        "router": {*ROUTER, "journal"},
    }[command] | {"help"}
    # A switch has a negative.
    assert {name for name in found if name.removeprefix("no-") not in wanted} == set()
    assert wanted <= found


@pytest.mark.parametrize("name", ENGINE)
def test_an_option_of_the_engine_sets_its_field_for_both_commands(name: str) -> None:
    words, path, value = ENGINE[name]
    argv = [f"--{name}", *words] + ([] if name == "model" else ["--model", "m"])
    offline = cli.parse(["offline", "--input", "i", "--output", "o", *argv])
    served = cli.parse(["serve", *argv])
    plain = EngineConfig(model="m")
    for args in (offline, served):
        assert attrgetter(path)(args.engine) == value
        if name not in ("model", "cuda-graphs"):
            assert args.engine != plain
        assert _with(plain, path, value) == args.engine, "another field changed too"


@pytest.mark.parametrize("name", SERVE)
def test_an_option_of_serve_sets_its_field(name: str) -> None:
    words, path, value = SERVE[name]
    config = cli.parse(["serve", "--model", "m", f"--{name}", *words])
    plain = ServeConfig(engine=EngineConfig(model="m"))
    assert config == dataclasses.replace(plain, **{path: value}) != plain


@pytest.mark.parametrize("name", ROUTER)
def test_an_option_of_router_sets_its_field(name: str) -> None:
    words, path, value = ROUTER[name]
    config = cli.parse(["router", f"--{name}", *words])
    assert config == dataclasses.replace(RouterConfig(), **{path: value}) != RouterConfig()


def _with(config: EngineConfig, path: str, value: object) -> EngineConfig:
    first, _, rest = path.partition(".")
    if rest:
        value = dataclasses.replace(getattr(config, first), **{rest: value})
    return dataclasses.replace(config, **{first: value})


def test_no_option_leaves_the_defaults_of_the_configuration() -> None:
    plain = EngineConfig(model="m")
    assert cli.parse(["serve", "--model", "m"]) == ServeConfig(engine=plain)
    assert cli.parse(REQUIRED) == cli.Offline(engine=plain, input="i", output="o")


@pytest.mark.parametrize("option", ["--num-pages", "--max-step-tokens", "--refusal", "--start-s"])
def test_what_is_no_option_is_refused(option: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["serve", "--model", "m", option, "1"])
    assert caught.value.code == 2


def test_a_configuration_survives_its_way_to_a_process() -> None:
    args = ["serve", "--model", "m", "--kv-memory", "0.5", "--seed", "3", "--no-prefix-cache"]
    engine = cli.parse(args).engine
    assert msgspec.json.decode(msgspec.json.encode(engine), type=EngineConfig) == engine


UNFIT = [
    ("--tp", "0"),
    ("--port", "70000"),
    ("--kv-memory", "0"),
    ("--kv-memory", "nan"),
    ("--kv-memory", "inf"),
    ("--mem-fraction", "1.5"),
    ("--trainer-memory", "-1.0"),
    ("--base-gpu", "-1"),
    ("--draft-tokens", "0"),
    ("--draft-tokens", "8"),
    ("--weight-version", "-1"),
    ("--weight-version", str(2**53 + 1)),
    ("--seed", str(2**63)),
    ("--context-length", str(2**31)),
    ("--max-body-mib", "0"),
    ("--receive-timeout-s", "nan"),
    ("--tool-parser", "nothing"),
    ("--reasoning-parser", "hermes"),
    ("--send-timeout-s", "0"),
    ("--http-processes", "0"),
]


def test_every_number_has_a_range() -> None:
    """Which holds its default and what the tables above set."""
    config = ServeConfig(engine=EngineConfig(model="m"))
    check_serve(config)
    check_router(RouterConfig())
    tables = ((ENGINE, ENGINE_RANGES), (SERVE, SERVE_RANGES), (ROUTER, ROUTER_RANGES))
    for table, ranges in tables:
        numbers = {
            f"--{name}": path
            for name, (_, path, value) in table.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        assert numbers == {option: span.path for option, span in ranges.items()}


@pytest.mark.parametrize("option,value", UNFIT)
def test_a_value_of_serve_without_a_meaning_names_its_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--model", "m", option, value])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"InvalidRequest ({option}): is {value}")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--silence-s", "0"), ("--port", "70000"), ("--worker", "here"), ("--patience-s", "-1")],
)
def test_a_value_of_router_without_a_meaning_names_its_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["router", option, value])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"InvalidRequest ({option})")


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
