"""Rollout throughput on random weights: tokens per second, and the share of the machine's floor.

    python benchmarks/gpu_rollout.py --model benchmarks/shapes/qwen2.5-1.5b.json \
        --workloads group single --peer transformers

The engine is started first, since the time from the start of this process to the first token is
one of the figures; then the machine's own copy bandwidth and bf16 matrix rate are measured, from
which the floor follows. Every workload warms up on shortened lengths, then runs once. Logprobs
are returned with every token. `--previous` compares with earlier results, `--profile` prints the
kernels of one decode step, `--logprob-cost` runs each workload with and without logprobs in the
reply, `--replay` compares steps of the loop with bare replays of their graphs, and `--peer` runs
the workloads on other engines once this one has freed the GPU.

`cpu_rollout.py` is its counterpart for a machine without a GPU, where the floor is another.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import torch
import tyro
from gpu_rollout_engine import Bench
from gpu_rollout_logprobs import logprob_cost
from gpu_rollout_previous import model_name, previous_figures
from gpu_rollout_replay import replay_ratio
from gpu_rollout_workloads import ModelBytes, WorkloadName, floor_seconds, make_workload
from machine import describe
from rollout_peers import PeerName, PeerOptions, run_in_process

from engine.config import (
    AttentionBackendName,
    CacheConfig,
    EngineConfig,
    KVDType,
    Quantization,
    SchedulerConfig,
)
from engine.protocol import BeginUpdate, TensorSpec

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    """A config.json, or a model with its weights (then set --load-format auto)."""
    workloads: tuple[WorkloadName, ...] = ("group", "single")
    """Workloads, in order."""
    load_format: Literal["auto", "random"] = "random"
    """Where the weights come from."""
    attention: AttentionBackendName = "auto"
    """Attention back end."""
    quantization: Quantization = "none"
    """What weights of linear layers are stored as."""
    kv_dtype: KVDType = "auto"
    """What keys and values are kept as."""
    max_running: int = 1024
    """Most sequences running at once."""
    max_step_tokens: int = 8192
    """Most tokens of one step."""
    cuda_graphs: bool = True
    """Replay decode steps as CUDA graphs."""
    overlap: bool | None = None
    """Plan a step while the one before it runs; None takes the engine's default."""
    shorten: int = 1
    """Divide output lengths by this, for a quick look."""
    profile: bool = False
    """Print the kernel table of one decode step."""
    logprob_cost: bool = False
    """Run each workload with and without logprobs in the reply, twice each."""
    embedding_scale: float = 1.0
    """Embeddings so many times as large as random weights have them. Tokens then resemble each
    other less after some layers, and those of a mixture share fewer experts."""
    replay: tuple[int, ...] = ()
    """Batch sizes at which to compare steps with bare graph replays."""
    peer: tuple[PeerName, ...] = ()
    """Other engines to run the workloads on, each in a process of its own."""
    peer_shorten: int = 1
    """Divide the output lengths of peers by this, for the slow ones."""
    peer_max_rows: int = 1024
    """Most sequences that a peer may run at once."""
    peer_timeout_s: float = 1200.0
    """Longest that one peer may take for one workload, start-up included."""
    previous: str | None = None
    """File or folder of earlier results to print beside the new ones; None takes the results
    beside this script."""
    json: str | None = None
    """Write the figures to this file."""


def engine_config(options: Options) -> EngineConfig:
    """The engine that is measured."""
    return EngineConfig(
        model=options.model,
        load_format=options.load_format,
        attention=options.attention,
        quantization=options.quantization,
        cuda_graphs=options.cuda_graphs,
        context_length=8192,
        cache=CacheConfig(kv_dtype=options.kv_dtype),
        scheduler=SchedulerConfig(
            max_running=options.max_running,
            max_step_tokens=options.max_step_tokens,
            overlap=options.overlap,
        ),
    )


def process_age_s() -> float:
    """Seconds since this process was created."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks_per_s = 100
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / ticks_per_s


def ceilings() -> dict[str, float]:
    """This machine's copy bandwidth (bytes read plus written a second) and bf16 FLOP/s."""
    from triton.testing import do_bench

    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = do_bench(lambda: target.copy_(source), return_mode="median")
    size = 8192
    a = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    gemm_ms = do_bench(lambda: a @ b, return_mode="median")
    return {
        "copy_bytes_per_s": 2 * (1 << 30) / (copy_ms * 1e-3),
        "gemm_flop_per_s": 2 * size**3 / (gemm_ms * 1e-3),
    }


def model_bytes(
    model: str,
    num_parameters: int,
    quantization: Quantization = "none",
    kv_dtype: KVDType = "auto",
) -> ModelBytes:
    """Sizes by the config.json; an input embedding of its own is not read by matrix products."""
    path = Path(model)
    config = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    params, head = num_parameters, config["vocab_size"] * config["hidden_size"]
    if not config.get("tie_word_embeddings"):
        params -= head
    weight_bytes = 2 * params if quantization == "none" else params + head
    head_bytes = 2 * head_dim if kv_dtype == "auto" else head_dim + 2
    kv_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_bytes
    return ModelBytes(params=params, weight_bytes=weight_bytes, kv_bytes_per_token=kv_bytes)


def run_workload(
    bench: Bench, name: WorkloadName, model: ModelBytes, machine: dict[str, float]
) -> dict[str, Any]:
    """All figures of one workload."""
    work = make_workload(name)
    figures: dict[str, Any] = dict(bench.measure(work))
    for key, share in (("floor_s", False), ("shared_floor_s", True)):
        figures[key] = floor_seconds(
            work,
            model,
            copy_bytes_s=machine["copy_bytes_per_s"],
            flops=machine["gemm_flop_per_s"],
            share_prompts=share,
        )
    figures["share_of_floor"] = figures["floor_s"] / figures["seconds"]
    profile = bench.profile(work)
    figures["profile"] = {k: v for k, v in asdict(profile).items() if k != "kernels"}
    figures["kernels"] = [list(row) for row in profile.kernels[:30]]
    return figures


def show(name: str, figures: dict[str, Any], *, with_kernels: bool) -> None:
    """Print one workload."""
    profile = figures["profile"]
    print(
        f"{name}: {figures['tokens_per_s']:,.0f} tok/s, {figures['tokens']:,} tokens in "
        f"{figures['seconds']:.2f} s; floor {figures['floor_s']:.2f} s "
        f"({100 * figures['share_of_floor']:.0f}% reached), "
        f"{figures['shared_floor_s']:.2f} s with prompts read once a group\n"
        f"  decode step {figures['step_ms']:.3f} ms, host {figures['host_ms']:.3f} ms; profiled: "
        f"{profile['step_us']:.0f} us, busy {profile['busy_us']:.0f}, between kernels "
        f"{profile['between_us']:.0f}, gap to the next step {profile['gap_us']:.0f}"
    )
    if with_kernels:
        for kernel, calls, spent in figures["kernels"]:
            print(f"  {spent:9.1f} us {calls:7.1f} x  {kernel[:100]}")


def show_previous(options: Options, name: str, figures: dict[str, Any]) -> None:
    """Print what an earlier run of this machine and model had."""
    source = RESULTS if options.previous is None else Path(options.previous)
    found = previous_figures(
        source,
        machine=describe(),
        model=options.model,
        workload=name,
        quantization=options.quantization,
    )
    if found is None:
        print("  previous: none on this machine")
        return
    file, before = found
    change = figures["tokens_per_s"] / before["tokens_per_s"] - 1
    print(f"  previous: {before['tokens_per_s']:,.0f} tok/s ({file}), now {100 * change:+.1f}%")


def first_token_s(bench: Bench) -> float:
    """Seconds from the start of this process to its first token."""
    bench.submit(bench.requests(make_workload("single"), shorten=256))
    while not bench.executor.decode_only:
        bench.replica.step()
    age = process_age_s()
    bench.finish()
    return age


def draw_embeddings(options: Options, bench: Bench) -> None:
    """Random embeddings of another scale, by an update of the one tensor."""
    config = json.loads(Path(options.model).read_text())
    generator = torch.Generator().manual_seed(0)
    shape = (config["vocab_size"], config["hidden_size"])
    drawn = torch.randn(shape, generator=generator) * config["initializer_range"]
    spec = TensorSpec(name="model.embed_tokens.weight", dtype="float32", shape=list(shape))
    begin = BeginUpdate(version=bench.replica.state().version + 1, manifest=[spec], partial=True)
    bench.replica.update_weights_inproc(
        begin, [(spec.name, drawn * options.embedding_scale)], lasting=True
    )


def start(options: Options) -> tuple[Bench, dict[str, Any]]:
    """Bring up the engine and measure the machine; prints both."""
    bench = Bench(engine_config(options), options.shorten)
    if options.embedding_scale != 1.0:
        draw_embeddings(options, bench)
    first_s = first_token_s(bench)
    machine = ceilings()
    torch.cuda.empty_cache()
    facts = bench.executor.facts
    print(
        f"{describe()}, torch {torch.__version__}: copy "
        f"{machine['copy_bytes_per_s'] / 1e9:,.0f} GB/s, bf16 product "
        f"{machine['gemm_flop_per_s'] / 1e12:,.0f} TFLOP/s\n{model_name(options.model)}: first "
        f"token {first_s:.1f} s after the start of the process (load {facts.load_seconds:.1f} s), "
        f"attention {facts.attention}"
    )
    left_out = ("json", "previous", "model")
    return bench, {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": describe(),
        "torch": torch.__version__,
        "options": {"model": model_name(options.model)}
        | {k: v for k, v in asdict(options).items() if k not in left_out},
        "attention": facts.attention,
        "ceilings": machine,
        "first_token_s": first_s,
        "load_s": facts.load_seconds,
    }


def run_ours(options: Options, bench: Bench, report: dict[str, Any]) -> list[str]:
    """Fill `report` with all that is measured on our engine; what failed."""
    report["workloads"], report["replay"] = {}, []
    failed = []
    for name in options.workloads:
        failed += attempt(name, lambda n=name: measure(options, bench, report, n), bench)
    for rows in options.replay:
        failed += attempt(f"replay {rows}", lambda r=rows: replay(bench, report, r), bench)
    return failed


def attempt(part: str, run: Callable[[], None], bench: Bench) -> list[str]:
    """Run a part. If it raises, print why, empty the engine, and return its name."""
    try:
        run()
        return []
    except Exception:
        traceback.print_exc()
        bench.abandon()
        return [part]


def measure(options: Options, bench: Bench, report: dict[str, Any], name: WorkloadName) -> None:
    """One workload and what it cost to return its logprobs."""
    num_parameters = bench.executor.facts.num_parameters
    model = model_bytes(options.model, num_parameters, options.quantization, options.kv_dtype)
    figures = run_workload(bench, name, model, report["ceilings"])
    report["workloads"][name] = figures
    show(name, figures, with_kernels=options.profile)
    show_previous(options, name, figures)
    if options.logprob_cost:
        cost = logprob_cost(bench, make_workload(name), shorten=options.shorten)
        figures["logprob_cost"] = cost
        print(
            f"  with logprobs / without: {cost['ratio']:.4f} (replies took "
            f"{cost['reply_s_with']:.2f} and {cost['reply_s_without']:.2f} s)"
        )


def replay(bench: Bench, report: dict[str, Any], rows: int) -> None:
    """Steps of the loop against bare replays."""
    row = replay_ratio(bench, rows)
    report["replay"].append(row)
    print(
        f"replay, {rows} rows: step {row['loop_ms']:.3f} ms, bare graph {row['bare_ms']:.3f} ms, "
        f"ratio {row['ratio']:.3f}, gap {row['gap_us']:.0f} us"
    )


def run_peers(options: Options, report: dict[str, Any]) -> list[str]:
    """Run the workloads on other engines; what failed."""
    report["peers"] = {}
    failed = []
    for peer in options.peer:
        for name in options.workloads:
            asked = PeerOptions(
                peer=peer,
                model=options.model,
                workload=name,
                shorten=options.shorten * options.peer_shorten,
                max_rows=options.peer_max_rows,
                timeout_s=options.peer_timeout_s,
            )
            found = run_in_process(asked)
            report["peers"].setdefault(peer, {})[name] = found
            if "error" in found:
                failed.append(f"{peer} {name}")
                print(f"{peer}, {name}: failed: {found['error']}")
            else:
                show_peer(asked, found, report["workloads"].get(name))
    return failed


def show_peer(asked: PeerOptions, found: dict[str, Any], ours: dict[str, Any] | None) -> None:
    """Print a peer's figure, and ours over it if there is one."""
    lengths = "" if asked.shorten == 1 else f", output lengths / {asked.shorten}"
    line = f"{asked.peer} {found['version']}, {asked.workload}: {found['tokens_per_s']:,.0f} tok/s"
    if ours is not None:
        found["ratio"] = ours["tokens_per_s"] / found["tokens_per_s"]
        line += f"; ours is {found['ratio']:.2f} times as fast"
    print(line + lengths)


def main() -> int:
    """Measure and print; 1 if a part failed."""
    options = tyro.cli(Options)
    bench, report = start(options)
    failed = run_ours(options, bench, report)
    bench.close()
    failed += run_peers(options, report)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
