"""The workloads of `benchmarks/gpu_rollout.py` on another engine.

    python benchmarks/rollout_peers.py --peer transformers --model config.json --workload wa

Same shape with random weights, same token ids in, temperature 1, fixed lengths without a stop
token, the logprob of every token returned, prefix caching on. transformers' continuous batching
needs nothing else; vLLM and SGLang run where they can be imported. Start-up and a warm-up on
shortened lengths are not counted. Prints the figures as one line of JSON, the last of its output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import tyro
from gpu_rollout_workloads import WorkloadName, make_workload
from rollout_peers_calls import Answer, Ask, Run

PeerName = Literal["transformers", "vllm", "sglang"]


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """What to run where."""

    peer: PeerName
    """The engine."""
    model: str
    """A config.json, or a folder with one."""
    workload: WorkloadName
    """The workload."""
    shorten: int = 1
    """Divide output lengths by this."""
    logprobs: bool = True
    """Return the logprob of every token."""
    max_rows: int = 1024
    """Most sequences the peer may run at once; fewer take less memory."""
    timeout_s: float = 1200.0
    """Longest that the run may take, start-up included."""


def asks(workload: WorkloadName, vocab_size: int, *, seed: int, shorten: int) -> list[Ask]:
    """The workload as any engine takes it."""
    requests = make_workload(workload).requests(vocab_size, seed=seed, shorten=shorten)
    return [Ask(r.prompt_ids.tolist(), r.sampling.max_new_tokens) for r in requests]


def open_peer(options: PeerOptions, longest: int) -> AbstractContextManager[Run]:
    """Start the peer's engine for sequences of up to `longest` tokens."""
    if options.peer == "transformers":
        from rollout_peers_transformers import opened
    elif options.peer == "vllm":
        from rollout_peers_vllm import opened
    else:
        from rollout_peers_sglang import opened
    opener: Callable[..., AbstractContextManager[Run]] = opened
    return opener(
        config_file(options.model),
        longest=longest,
        max_rows=options.max_rows,
        logprobs=options.logprobs,
        timeout_s=options.timeout_s,
    )


def measure(options: PeerOptions) -> dict[str, Any]:
    """Warm up, run once, check that everything came back."""
    vocab_size = json.loads(config_file(options.model).read_text())["vocab_size"]
    work = asks(options.workload, vocab_size, seed=2, shorten=options.shorten)
    warm = asks(options.workload, vocab_size, seed=1, shorten=16 * options.shorten)
    longest = max(len(ask.prompt_ids) + ask.num_tokens for ask in work)
    with open_peer(options, longest) as run:
        run(warm)
        started = time.perf_counter()
        answers = run(work)
        seconds = time.perf_counter() - started
    check(work, answers, logprobs=options.logprobs)
    num_tokens = sum(ask.num_tokens for ask in work)
    return {
        "peer": options.peer,
        "version": version(options.peer),
        "tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "shorten": options.shorten,
        "logprobs": options.logprobs,
    }


def check(work: list[Ask], answers: list[Answer], *, logprobs: bool) -> None:
    """Raise RuntimeError if a request got fewer or more tokens or logprobs than it asked for."""
    for index, (ask, answer) in enumerate(zip(work, answers, strict=True)):
        wanted = Answer(ask.num_tokens, ask.num_tokens if logprobs else answer.num_logprobs)
        if answer != wanted:
            raise RuntimeError(f"request {index} came back with {answer}, not {wanted}")


def config_file(model: str) -> Path:
    """The config.json at a path."""
    path = Path(model)
    return path / "config.json" if path.is_dir() else path


def run_in_process(options: PeerOptions) -> dict[str, Any]:
    """`measure` in a process of its own, which frees the GPU when it ends.

    Returns its figures, or {"error": ...} with the end of what it wrote.
    """
    flags = {f"--{key.replace('_', '-')}": value for key, value in asdict(options).items()}
    flags.pop("--logprobs")
    command = [sys.executable, str(Path(__file__).resolve())]
    command += [part for flag, value in flags.items() for part in (flag, str(value))]
    command.append("--logprobs" if options.logprobs else "--no-logprobs")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=options.timeout_s)
        except subprocess.TimeoutExpired:
            return {"error": f"not done within {options.timeout_s:g} s"}
        finally:
            # Engines start processes of their own; none may outlive its turn on the GPU.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        return {"error": (stderr or stdout)[-2000:]}
    figures: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(PeerOptions))))
