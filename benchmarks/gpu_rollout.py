"""Rollout throughput on random weights: tokens per second, and the share of the machine's floor.

    python benchmarks/gpu_rollout.py --model config.json --workloads group single

The engine is started first, since the time from the start of this process to the first token is
one of the figures; then the machine's own copy bandwidth and bf16 matrix rate are measured, from
which the floor follows. Every workload warms up on shortened lengths, then runs once. Logprobs
are returned with every token. `--profile` prints the kernels of one decode step.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from gpu_rollout_profile import StepProfile, profile_steps
from gpu_rollout_workloads import ModelBytes, Workload, floor_seconds, make_workload
from machine import describe

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.executor import Executor, build_executor
from engine.protocol import Abort, FlushCache, StepPlan, StepResult, WeightCommand
from rollout.replica import InlineReplica


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    """A config.json, or a model with its weights (then set --load-format auto)."""
    workloads: tuple[Literal["group", "group8", "single", "tail"], ...] = ("group", "single")
    """Workloads, in order."""
    load_format: Literal["auto", "random"] = "random"
    """Where the weights come from."""
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
    json: str | None = None
    """Write the figures to this file."""


class TimedExecutor:
    """An executor that adds up how long its callers wait for results."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.facts = inner.facts
        self.waited_s = 0.0
        self.decode_only = False

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> TimedStep:
        self.decode_only = bool(plan.query_lens.max() == 1)
        return TimedStep(self, self._inner.launch(plan))

    def handle(self, command: WeightCommand) -> Any:
        return self._inner.handle(command)

    def receive(self, tensors: Iterable[tuple[str, Any]]) -> None:
        self._inner.receive(tensors)

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True)
class TimedStep:
    """A pending step whose wait is counted."""

    executor: TimedExecutor
    inner: Any

    def result(self) -> StepResult:
        started = time.perf_counter()
        result: StepResult = self.inner.result()
        self.executor.waited_s += time.perf_counter() - started
        return result


class Bench:
    """One engine and the figures taken on it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        config = EngineConfig(
            model=options.model,
            load_format=options.load_format,
            cuda_graphs=options.cuda_graphs,
            context_length=8192,
            cache=CacheConfig(),
            scheduler=SchedulerConfig(
                max_running=options.max_running,
                max_step_tokens=options.max_step_tokens,
                overlap=options.overlap,
            ),
        )
        self.executor = TimedExecutor(build_executor(config))
        self.replica = InlineReplica(config, self.executor)
        self._seed = 0

    def start(self, work: Workload, shorten: int = 1) -> int:
        """Submit the workload with fresh prompts; returns its output tokens."""
        self._seed += 1
        self.replica.send(FlushCache())
        vocab = self.executor.facts.vocab_size
        requests = work.requests(vocab, seed=self._seed, shorten=shorten)
        self.replica.submit(requests)
        return sum(request.sampling.max_new_tokens for request in requests)

    def finish(self) -> None:
        """Step until nothing is left."""
        while not self.replica.idle():
            self.replica.step()

    def measure(self, work: Workload) -> dict[str, float]:
        """Warm up, then run the workload once, timing every decode step."""
        self.start(work, shorten=16 * self.options.shorten)
        self.finish()
        num_tokens = self.start(work, self.options.shorten)
        walls, hosts = [], []
        started = time.perf_counter()
        while not self.replica.idle():
            waited, before = self.executor.waited_s, time.perf_counter()
            self.replica.step()
            wall = time.perf_counter() - before
            if self.executor.decode_only:
                walls.append(wall)
                hosts.append(wall - (self.executor.waited_s - waited))
        seconds = time.perf_counter() - started
        return {
            "tokens": num_tokens,
            "seconds": seconds,
            "tokens_per_s": num_tokens / seconds,
            "decode_steps": len(walls),
            "decode_seconds": sum(walls),
            "step_ms": 1e3 * statistics.median(walls),
            "host_ms": 1e3 * statistics.median(hosts),
        }

    def profile(self, work: Workload, after: int = 40, count: int = 10) -> StepProfile:
        """Kernel times of `count` decode steps, the first `after` some time into the run."""
        self.start(work)
        steps = 0
        while steps < after:
            self.replica.step()
            steps += self.executor.decode_only
        profile = profile_steps(self.replica.step, count)
        self.replica.send(Abort(all=True))
        self.finish()
        return profile


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


def model_bytes(model: str, num_parameters: int) -> ModelBytes:
    """Sizes by the config.json; an input embedding of its own is not read by matrix products."""
    path = Path(model)
    config = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    params = num_parameters
    if not config.get("tie_word_embeddings"):
        params -= config["vocab_size"] * config["hidden_size"]
    kv_bytes = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    return ModelBytes(params=params, weight_bytes=2 * params, kv_bytes_per_token=kv_bytes)


def run_workload(
    bench: Bench, name: str, model: ModelBytes, machine: dict[str, float]
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


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options)
    bench = Bench(options)
    bench.start(make_workload("single"), shorten=256)
    while not bench.executor.decode_only:
        bench.replica.step()
    first_token_s = process_age_s()
    bench.finish()
    machine = ceilings()
    torch.cuda.empty_cache()
    facts = bench.executor.facts
    model = model_bytes(options.model, facts.num_parameters)
    print(
        f"{describe()}, torch {torch.__version__}: copy "
        f"{machine['copy_bytes_per_s'] / 1e9:,.0f} GB/s, bf16 product "
        f"{machine['gemm_flop_per_s'] / 1e12:,.0f} TFLOP/s\n{options.model}: first token "
        f"{first_token_s:.1f} s after the start of the process (load {facts.load_seconds:.1f} s)"
    )
    results = {}
    for name in options.workloads:
        results[name] = run_workload(bench, name, model, machine)
        show(name, results[name], with_kernels=options.profile)
    if options.json:
        report = {
            "machine": describe(),
            "torch": torch.__version__,
            "options": {k: v for k, v in asdict(options).items() if k != "json"},
            "ceilings": machine,
            "first_token_s": first_token_s,
            "load_s": facts.load_seconds,
            "workloads": results,
        }
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
