"""What HTTP costs: the server against the same work without it, in one run.

    python benchmarks/over_http.py --only requests
    python benchmarks/over_http.py --only rollout first --device cuda --http-processes 8

requests: 32 ids in and 16 out, not streaming, before an engine that costs nothing, on two cores:
    requests a second over those of a bare uvicorn that sends the same bodies back.
rollout: the workload `group` of `gpu_rollout.py` on random weights, ids and logprobs: tokens a
    second over those of the replica without a server; not streaming, and streaming every token.
first: seconds to the first token of one open request, over HTTP and without it.

paced: the same as rollout without a GPU: an engine that takes a fixed time a step, as a GPU does.

Every side has a process of its own; sides alternate. Clients are raw sockets in one process, which
with 8 cores and more has two of them to itself, and whatever is measured the others; `client_s` is
its processor time while it measures. On a GPU the sides of `rollout` and `first`
run one after another, since each needs the whole of it. With `--device cpu` a tiny model shows
that the script runs, and nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import msgspec
import numpy as np
import tyro
from machine import describe
from over_http_children import FOLDER, Child, Listening, Server
from process_times import between, seconds_by_role

from engine.config import CacheConfig, EngineConfig, SchedulerConfig

Part = Literal["requests", "rollout", "first", "paced"]
IDS_IN, IDS_OUT = 32, 16


@dataclass(frozen=True)
class Options:
    """What to measure."""

    only: tuple[Part, ...] = ("requests",)
    """Parts, in order."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model of rollout and first runs."""
    model: str = str(FOLDER / "shapes" / "qwen2.5-1.5b.json")
    """Its config.json; weights are random."""
    rounds: int = 3
    """Times that each side is measured."""
    count: int = 6000
    """Requests of one measurement of requests."""
    connections: int = 64
    """Its connections."""
    http_processes: int = 1
    """Fronts of the server for rollout and first."""
    stream_processes: int = 8
    """Fronts of the server for the streams of rollout."""
    shorten: int = 1
    """Divide the output lengths of rollout by this, for a quick look."""
    step_ms: float = 13.0
    """Milliseconds of a step of paced."""
    rows: int = 1024
    """Sequences of paced, 16 of a prompt."""
    cores: int = 2
    """Cores that all processes of requests share."""
    json: Path | None = None
    """Write the figures to this file."""


def requests_part(options: Options) -> dict[str, Any]:
    """Requests a second of the whole server and of the bare one, in turn."""
    whole_machine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(whole_machine)[: options.cores])
    children: list[Child] = []
    try:
        load = Child("over_http_load.py")
        ours, bare = (
            Listening("over_http_mock.py", "serve", "1"),
            Listening("over_http_mock.py", "echo"),
        )
        children += [load, ours, bare]
        sampling = {"max_new_tokens": IDS_OUT, "ignore_eos": True}
        found: dict[str, list[dict[str, Any]]] = {"server": [], "echo": [], "completions": []}
        for number in range(options.rounds + 1):
            for side, port, path in (
                ("server", ours.port, "/generate"),
                ("completions", ours.port, "/v1/completions"),
                ("echo", bare.port, "/"),
            ):
                ids = list(range(100 + number, 100 + number + IDS_IN))
                body: dict[str, Any] = {"input_ids": ids, "sampling_params": sampling}
                if side == "completions":
                    body = {"model": "mock", "prompt": ids, "max_tokens": IDS_OUT}
                    body |= {"ignore_eos": True}
                job = {"do": "closed", "port": port, "path": path, "body": json.dumps(body)}
                job |= {"connections": options.connections, "count": options.count}
                process = bare.pid if side == "echo" else ours.pid
                before = seconds_by_role(process)
                measured = load.ask(job)
                spent = between(before, seconds_by_role(process)).items()
                measured["us"] = {role: 1e6 * s / options.count for role, s in spent}
                assert measured["statuses"] == ["200"], measured
                if number:  # the first round warms all of them up
                    found[side].append(measured)
    finally:
        for child in children:
            child.close()
        os.sched_setaffinity(0, whole_machine)
    rates = {
        side: [options.count / measured["seconds"] for measured in each]
        for side, each in found.items()
    }
    report: dict[str, Any] = {
        f"{side}_per_s": statistics.median(each) for side, each in rates.items()
    }
    report |= {
        f"{side}_p50_ms": 1e3 * statistics.median(m["p50_s"] for m in each)
        for side, each in found.items()
    }
    report["processor_us"] = {side: [one["us"] for one in each] for side, each in found.items()}
    for side, name in (("server", "ratio"), ("completions", "completions_ratio")):
        pairs = zip(rates[side], rates["echo"], strict=True)
        report[name] = statistics.median(ours / echo for ours, echo in pairs)
    return report


def engine_config(options: Options) -> EngineConfig:
    """The engine of rollout and first."""
    if options.device == "cuda":
        return EngineConfig(
            model=options.model,
            load_format="random",
            device="cuda",
            dtype="bfloat16",
            context_length=8192,
            scheduler=SchedulerConfig(max_running=1024, max_waiting=8192),
        )
    return EngineConfig(
        model=str(FOLDER / "shapes" / "tiny.json"),
        load_format="random",
        device="cpu",
        dtype="float32",
        context_length=512,
        cache=CacheConfig(memory_bytes=1 << 28),
        scheduler=SchedulerConfig(max_running=64, max_waiting=8192),
    )


class Sizes:
    """The workload `group`, or a small one for a CPU."""

    def __init__(self, options: Options) -> None:
        on_gpu = options.device == "cuda"
        self.prompts, self.samples = (64, 16) if on_gpu else (4, 4)
        self.ids_in, self.ids_out = (512, 1024) if on_gpu else (32, 64)
        self.ids_out = max(self.ids_out // options.shorten, 4)
        self.vocab_size = 150_000 if on_gpu else 500
        self._rng = np.random.default_rng(0)

    def drawn(self, count: int) -> list[list[int]]:
        """Prompts that no earlier call had."""
        found: list[list[int]] = self._rng.integers(
            5, self.vocab_size, (count, self.ids_in)
        ).tolist()
        return found

    def bodies(self, prompts: list[list[int]], *, stream: bool, max_new: int) -> list[Any]:
        """A POST of each prompt."""
        sampling = {"max_new_tokens": max_new, "ignore_eos": True, "n": self.samples}
        if len(prompts) == 1:
            sampling["n"] = 1
        more = {"return_logprob": True, "stream": stream, "sampling_params": sampling}
        return [{"input_ids": ids, **more} for ids in prompts]


def over_http(
    options: Options, config: EngineConfig, sizes: Sizes, *, stream: bool, processes: int
) -> list[dict[str, Any]]:
    """The group over HTTP, once for each round, behind one that warms it up."""
    server = Server(config, processes)
    try:
        return groups(options, sizes, server, stream=stream)
    finally:
        server.close()


def groups(
    options: Options, sizes: Sizes, server: Server | Listening, *, stream: bool
) -> list[dict[str, Any]]:
    """The group over HTTP, once for each round, behind one that warms it up."""
    load, found = Child("over_http_load.py"), []
    try:
        for number in range(options.rounds + 1):
            short = 1 if number else 16
            max_new = max(sizes.ids_out // short, 4)
            bodies = sizes.bodies(sizes.drawn(sizes.prompts), stream=stream, max_new=max_new)
            before = seconds_by_role(server.pid)
            measured = load.ask({"do": "at_once", "port": server.port, "bodies": bodies})
            spent = between(before, seconds_by_role(server.pid))
            tokens = measured["tokens"]
            assert tokens == sizes.prompts * sizes.samples * max_new, tokens
            one = {k: v for k, v in measured.items() if k != "first_s"}
            one |= {
                "stream": stream,
                "ms_per_token_of_a_row": 1e3 * measured["seconds"] / max_new,
                "bytes_per_token_of_all_rows": measured["bytes"] / max_new,
                "processor_s": spent,
                "handlers_us_per_token": 1e6 * spent.get("fronts", spent["server"]) / tokens,
            }
            print(json.dumps(one if number else {"warm_up": one}), flush=True)
            if number:
                found.append(one)
    finally:
        load.close()
    return found


def inline_group(options: Options, config: EngineConfig, sizes: Sizes) -> list[dict[str, Any]]:
    """The group without a server, once for each round, behind one that warms it up."""
    inline, found = Child("over_http_inline.py", msgspec.json.encode(config).decode()), []
    try:
        inline.line()
        for number in range(options.rounds + 1):
            max_new = max(sizes.ids_out // (1 if number else 16), 4)
            job = {"prompts": sizes.drawn(sizes.prompts), "samples": sizes.samples}
            measured = inline.ask({**job, "max_new": max_new})
            measured["ms_per_token_of_a_row"] = 1e3 * measured["seconds"] / max_new
            print(json.dumps({"inline": measured}), flush=True)
            if number:
                found.append(measured)
    finally:
        inline.close()
    return found


def rollout_part(options: Options) -> dict[str, Any]:
    """Tokens a second of the three sides."""
    config, sizes = engine_config(options), Sizes(options)
    sides = {
        "inline": inline_group(options, config, sizes),
        "http": over_http(options, config, sizes, stream=False, processes=options.http_processes),
        "stream": over_http(
            options, config, sizes, stream=True, processes=options.stream_processes
        ),
    }
    rates = {
        side: statistics.median(one["tokens"] / one["seconds"] for one in measured)
        for side, measured in sides.items()
    }
    frames = statistics.median(one["frames"] / one["tokens"] for one in sides["stream"])
    return {
        **{f"{side}_tokens_per_s": rate for side, rate in rates.items()},
        "ratio": rates["http"] / rates["inline"],
        "stream_ratio": rates["stream"] / rates["inline"],
        "frames_per_token": frames,
        "sides": sides,
    }


def paced_part(options: Options) -> dict[str, Any]:
    """Tokens a second of the three sides, before an engine that takes a fixed time a step."""
    sizes = Sizes(options)
    sizes.prompts, sizes.samples, sizes.ids_in = -(-options.rows // 16), 16, 512
    sizes.ids_out, sizes.vocab_size = max(1024 // options.shorten, 4), 30_000
    step, sides = str(options.step_ms), {}
    ideal_s = sizes.ids_out * options.step_ms / 1e3
    for side, stream, processes in (
        ("http", False, options.http_processes),
        ("stream", True, options.stream_processes),
    ):
        server = Listening("over_http_mock.py", "serve", str(processes), step)
        try:
            sides[side] = groups(options, sizes, server, stream=stream)
        finally:
            server.close()
    seconds = {
        side: statistics.median(one["seconds"] for one in each) for side, each in sides.items()
    }
    return {
        "ratio": ideal_s / seconds["http"],
        "stream_ratio": ideal_s / seconds["stream"],
        "sides": sides,
    }


def first_part(options: Options) -> dict[str, Any]:
    """Seconds to the first token of one open request."""
    config, sizes = engine_config(options), Sizes(options)
    count = 20 * options.rounds
    inline = Child("over_http_inline.py", msgspec.json.encode(config).decode())
    try:
        inline.line()
        inline.ask({"prompts": sizes.drawn(20), "first": True, "max_new": 4})
        job = {"prompts": sizes.drawn(count), "first": True, "max_new": 4}
        alone = inline.ask(job)["first_s"]
    finally:
        inline.close()
    server, load = Server(config, options.http_processes), Child("over_http_load.py")
    served = []
    try:
        for number, ids in enumerate(sizes.drawn(20 + count)):
            bodies = sizes.bodies([ids], stream=True, max_new=4)
            measured = load.ask({"do": "at_once", "port": server.port, "bodies": bodies})
            if number >= 20:
                served += measured["first_s"]
    finally:
        load.close()
        server.close()
    alone_ms, served_ms = (1e3 * statistics.median(each) for each in (alone, served))
    return {"inline_ms": alone_ms, "http_ms": served_ms, "more_ms": served_ms - alone_ms}


def table(report: dict[str, Any]) -> str:
    """The ratios, with what is wanted of them."""
    rows = [
        ("requests", "ratio", "requests/s over those of a bare echo", ">= 0.4"),
        ("requests", "completions_ratio", "the same of /v1/completions", ""),
        ("rollout", "ratio", "tokens/s over those without a server", ">= 0.98"),
        ("rollout", "stream_ratio", "the same, streaming every token", ">= 0.9"),
        ("paced", "ratio", "tokens/s over those of an engine of fixed steps", ""),
        ("paced", "stream_ratio", "the same, streaming every token", ""),
        ("first", "more_ms", "ms to the first token, beyond those without", "<= 2"),
    ]
    lines = [
        f"{part:9} {report[part][key]:8.3f}  {what} {wanted and f'(wanted: {wanted})'}"
        for part, key, what, wanted in rows
        if part in report
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for, print it and save it."""
    options = tyro.cli(Options)
    parts = {"requests": requests_part, "rollout": rollout_part, "first": first_part}
    parts["paced"] = paced_part
    report: dict[str, Any] = {"machine": describe(), "device": options.device}
    for part in options.only:
        report[part] = parts[part](options)
        print(json.dumps({part: report[part]}), flush=True)
    print(table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
