"""What it costs to put an engine to sleep and to wake it, and to update it without a pause.

    python benchmarks/sleep.py --models benchmarks/shapes/qwen2.5-1.5b.json

Correctness comes first: greedy text and logprobs of one batch must be bit-equal before and after
every release, with a CPU backup, and without one once the same weights were published again. Then:

release, resume: wall time of `ReleaseMemory()` and `ResumeMemory()`, bytes moved, and bytes of the
    device still in use while asleep, the driver's context included. In between the GPU multiplies
    matrices for `--away` seconds, as training would; at once: it does not, and the resume waits
    until the driver has cleared the memory that the release gave back.
pinned copy: one copy of the weights' bytes between the device and pinned host memory, the floor
    of a release or resume with a backup; weights alone: only the tag `weights` goes and comes.
first step: the batch's first steps after waking against the same ones before.
stall: longest time between two steps' results around an in-process update while requests run
    and keep their KV, against the median step.
cycles: release, resume and a few tokens, again and again; memory must stay flat.

On a CPU (`--models benchmarks/shapes/tiny.json`) this is a smoke test of itself.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from machine import describe

from engine.config import CacheConfig, EngineConfig, MemoryConfig, SchedulerConfig
from engine.executor import read_checkpoint
from engine.protocol import (
    BeginUpdate,
    FlushCache,
    MemoryTag,
    Pause,
    ReleaseMemory,
    Reply,
    Request,
    Resume,
    ResumeMemory,
    SamplingParams,
)
from engine.saver import TorchMemorySaver
from rollout.launch import launch
from rollout.replica.inline import InlineReplica

SMALL = Path(__file__).parent / "shapes" / "tiny.json"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    models: tuple[str, ...] = (str(SMALL),)
    """Files like config.json; weights are random."""
    rows: int = 64
    """Requests that decode at once."""
    tokens: int = 32
    """Tokens each samples."""
    cycles: int = 20
    """Release and resume this often, to see that memory stays flat."""
    away: float = 0.5
    """Seconds of training between a release and a resume."""
    memory_fraction: float = 0.85
    """Share of free memory for the KV pool."""
    max_running: int = 256
    """Most sequences running at once."""
    json: str | None = None
    """Write the figures to this file."""


Figures = dict[str, Any]


class Bench:
    """One engine, the batch it is asked for, and what it answered first."""

    def __init__(self, options: Options, model: str, **memory: Any) -> None:
        self.options, self.model = options, model
        cuda = torch.cuda.is_available()
        config = EngineConfig(
            model=model,
            load_format="random",
            context_length=4096 if cuda else None,
            memory=MemoryConfig(**memory),
            cache=CacheConfig(
                memory_fraction=options.memory_fraction,
                num_pages=None if cuda else 600,
            ),
            scheduler=SchedulerConfig(max_running=options.max_running if cuda else options.rows),
        )
        replica = launch(config)
        assert isinstance(replica, InlineReplica)
        self.replica = replica
        self.vocab_size = replica.state().vocab_size
        self._num_batches = 0

    def batch(self, max_new: int | None = None) -> list[Request]:
        """Greedy requests, the same prompts every time."""
        rng = np.random.default_rng(0)
        self._num_batches += 1
        sampling = SamplingParams(
            temperature=0.0, max_new_tokens=max_new or self.options.tokens, ignore_eos=True
        )
        return [
            Request(
                rid=f"{self._num_batches}-{row}",
                prompt_ids=rng.integers(10, self.vocab_size, 100, dtype=np.int32),
                sampling=sampling,
                seed=row,
            )
            for row in range(self.options.rows)
        ]

    def run(self, max_new: int | None = None) -> tuple[list[bytes], list[float]]:
        """Tokens and logprob bits of the batch from an empty cache, and seconds of each step."""
        self.replica.send(FlushCache())
        requests = self.batch(max_new)
        found: dict[str, bytes] = {}
        steps: list[float] = []
        self.replica.submit(requests)
        while not self.replica.idle():
            started = time.perf_counter()
            for output in self.replica.step():
                if output.finish is not None:
                    assert output.finish.type == "length", output.finish
                    found[output.rid] = output.token_ids.tobytes() + output.logprobs.tobytes()
            steps.append(time.perf_counter() - started)
        return [found[request.rid] for request in requests], steps

    def send(self, command: ReleaseMemory | ResumeMemory) -> tuple[Reply, float]:
        """Send one command; its reply, and seconds as its caller sees them."""
        started = time.perf_counter()
        reply = self.replica.send(command)
        return reply, time.perf_counter() - started

    def publish(self, version: int, tensors: list[tuple[str, torch.Tensor]]) -> float:
        """Update in process; seconds."""
        started = time.perf_counter()
        self.replica.update_weights_inproc(BeginUpdate(version=version), tensors)
        return time.perf_counter() - started


def train(seconds: float) -> None:
    """Keep the GPU busy and little of its memory."""
    if not torch.cuda.is_available():
        return
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a, out=out)
        torch.cuda.synchronize()


def device_used() -> int:
    """Bytes of the device in use by anybody; of a CPU nothing is known."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def first_steps(steps: list[float], count: int = 4) -> float:
    """Seconds of the first steps: prefill, its result, and the first decode steps."""
    return sum(steps[:count])


def paired_first_steps(bench: Bench, pairs: int = 8) -> Figures:
    """The first steps of a batch before a release and after its resume, medians over pairs:
    one pair alone spreads by a fifth, since the host prepares a prefill."""
    before, after = [], []
    for _ in range(pairs):
        before.append(first_steps(bench.run(max_new=6)[1]))
        bench.send(ReleaseMemory())
        train(bench.options.away)
        bench.send(ResumeMemory())
        after.append(first_steps(bench.run(max_new=6)[1]))
    return {
        "first_steps_ratio": statistics.median(after) / statistics.median(before),
        "first_steps_ms": [1e3 * statistics.median(before), 1e3 * statistics.median(after)],
    }


def sleep_and_wake(bench: Bench) -> Figures:
    """One release and resume of everything."""
    awake = device_used()
    release, release_s = bench.send(ReleaseMemory())
    asleep = device_used()
    refused = bench.replica.state().refusal
    assert "released" in refused, refused
    again, _ = bench.send(ReleaseMemory())
    assert again.memory[0].tags == {}, "a second release moved something"
    train(bench.options.away)
    resume, resume_s = bench.send(ResumeMemory())
    bench.send(ResumeMemory())
    return {
        "release_ms": release_s * 1e3,
        "resume_ms": resume_s * 1e3,
        "released_gib": {k: v / 2**30 for k, v in release.memory[0].tags.items()},
        "resumed_gib": sum(resume.memory[0].tags.values()) / 2**30,
        "awake_gib": awake / 2**30,
        "asleep_gib": asleep / 2**30,
        "awake_again_gib": device_used() / 2**30,
    }


def timed_cycles(bench: Bench, count: int, away: float, tags: Sequence[MemoryTag] = ()) -> Figures:
    """Many releases and resumes; how the times spread and whether memory stays flat."""
    release_ms, resume_ms, awake, asleep = [], [], [], []
    for _ in range(count):
        _, seconds = bench.send(ReleaseMemory(tags=list(tags)))
        release_ms.append(seconds * 1e3)
        asleep.append(device_used())
        train(away)
        _, seconds = bench.send(ResumeMemory(tags=list(tags)))
        resume_ms.append(seconds * 1e3)
        awake.append(device_used())
    return {
        "cycles": count,
        "release_ms_median": statistics.median(release_ms),
        "resume_ms_median": statistics.median(resume_ms),
        "release_ms_max": max(release_ms),
        "resume_ms_max": max(resume_ms),
        "asleep_gib": [asleep[0] / 2**30, asleep[-1] / 2**30],
        "awake_gib": [awake[0] / 2**30, awake[-1] / 2**30],
        "flat": awake[-1] <= 1.01 * awake[0] and asleep[-1] <= 1.01 * asleep[0],
    }


def backup_part(options: Options, model: str, expected: list[bytes]) -> Figures:
    """With a CPU backup: nothing has to be published."""
    bench = Bench(options, model, saver=True, cpu_backup=True)
    with bench.replica:
        bench.run()
        text, before = bench.run()
        assert text == expected, "greedy text of two engines differs"
        figures = sleep_and_wake(bench)
        text, after = bench.run()
        assert text == expected, "greedy text changed across a release with a CPU backup"
        _, later = bench.run()
        figures |= {
            **paired_first_steps(bench),
            "decode_steps_ratio": sum(after[2:6]) / sum(before[2:6]),
            "median_step_ms": [statistics.median(s) * 1e3 for s in (before, after, later)],
        }
        figures["timed"] = timed_cycles(bench, options.cycles, options.away)
        figures["at once"] = timed_cycles(bench, options.cycles, 0.0)
        text, _ = bench.run()
        assert text == expected, "greedy text changed over the cycles"
        figures["weights alone"] = timed_cycles(bench, options.cycles, options.away, ["weights"])
        figures["pinned_copy_ms"] = pinned_copy_ms(figures["released_gib"].get("weights", 0.0))
    return figures


def pinned_copy_ms(gib: float) -> dict[str, float]:
    """Milliseconds of one copy of so many bytes, each way; the device buffer is one piece."""
    if not torch.cuda.is_available() or not gib:
        return {}
    size = min(int(gib * 2**30), torch.cuda.mem_get_info()[0] * 9 // 10, 4 << 30)
    scale = gib * 2**30 / size
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    found = {}
    for name, target, source in (("to_host", host, device), ("to_device", device, host)):
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        found[name] = min(times) * scale * 1e3
    return found


def publish_part(options: Options, model: str, expected: list[bytes]) -> Figures:
    """Without a backup: weights come back by an update; then the stall of a running one."""
    checkpoint = read_checkpoint(model, "random")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    host = [(name, tensor.to(dtype)) for name, tensor in checkpoint.tensors]
    num_bytes = sum(tensor.nbytes for _, tensor in host)
    bench = Bench(options, model, saver=True, trainer_bytes=num_bytes)
    with bench.replica:
        bench.run()
        text, before = bench.run()
        assert text == expected, "greedy text of two engines differs"
        figures = sleep_and_wake(bench)
        assert "publish a whole version" in bench.replica.state().refusal
        figures["timed"] = timed_cycles(bench, options.cycles, options.away)
        figures["at once"] = timed_cycles(bench, options.cycles, 0.0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tensors = [(name, tensor.to(device)) for name, tensor in host]
        figures["publish_ms"] = bench.publish(1, tensors) * 1e3
        text, after = bench.run()
        assert text == expected, "greedy text differs after publishing the same weights"
        _, later = bench.run()
        figures["first_steps_ratio"] = first_steps(after) / first_steps(before)
        figures["decode_steps_ratio"] = sum(after[2:6]) / sum(before[2:6])
        figures["first_steps_ms"] = [first_steps(s) * 1e3 for s in (before, after, later)]
        figures |= stall(bench, tensors)
    return figures


def stall(bench: Bench, tensors: list[tuple[str, torch.Tensor]]) -> Figures:
    """Updates while the batch decodes and keeps its KV."""
    replica, updates = bench.replica, 3
    replica.submit(bench.batch(max_new=16 * (updates + 2)))
    gaps: list[float] = []
    stalls: list[float] = []
    last = time.perf_counter()
    version, num_steps = 1, 0
    while not replica.idle():
        replica.step()
        now = time.perf_counter()
        gaps.append(now - last)
        last, num_steps = now, num_steps + 1
        if num_steps % 16 == 0 and version <= updates:
            version += 1
            bench.publish(version, tensors)
            replica.step()
            # With overlap the first step only launches; its result comes with the next.
            replica.step()
            stalls.append(time.perf_counter() - last)
            last, num_steps = time.perf_counter(), num_steps + 2
    return {
        "stall_ms": max(stalls) * 1e3,
        "stalls_ms": [stall * 1e3 for stall in stalls],
        "step_ms": statistics.median(gaps) * 1e3,
    }


def plain_part(options: Options, model: str) -> tuple[list[bytes], Figures]:
    """An engine that cannot sleep: the text all others must give, and its step time."""
    bench = Bench(options, model)
    with bench.replica:
        bench.run()
        text, steps = bench.run()
        again, _ = bench.run()
        assert text == again, "greedy text differs between two runs of one engine"
        return text, {"median_step_ms": statistics.median(steps) * 1e3}


def paused_part(options: Options, model: str, expected: list[bytes]) -> Figures:
    """Requests that are retracted sleep through a release and give the same text."""
    bench = Bench(options, model, saver=True, cpu_backup=True)
    with bench.replica as replica:
        requests = bench.batch()
        replica.submit(requests)
        for _ in range(max(2, options.tokens // 2)):
            replica.step()
        replica.send(Pause(mode="retract"))
        bench.send(ReleaseMemory())
        bench.send(ResumeMemory())
        replica.send(Resume())
        found: dict[str, bytes] = {}
        while not replica.idle():
            for output in replica.step():
                if output.finish is not None:
                    found[output.rid] = output.token_ids.tobytes()
    same = sum(
        whole.startswith(found[request.rid])
        for request, whole in zip(requests, expected, strict=True)
    )
    # Prefilled again, a token's logits are summed in another order than when it was decoded.
    return {"retracted_rows_equal": f"{same} of {len(requests)}"}


class Parts:
    """Runs the parts one by one; a failure is printed and the next goes on."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One part."""
        started = time.perf_counter()
        try:
            yield
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"[{name}: {time.perf_counter() - started:.1f} s]", flush=True)


def raw_part(gib: int) -> Figures:
    """The saver alone: one piece of memory unmapped, mapped again and zeroed; then 200 pieces."""
    device = torch.device("cuda")
    saver = TorchMemorySaver(device)
    with saver.region("kv_cache"):
        whole = torch.zeros(gib << 30, dtype=torch.uint8, device=device)
    with saver.region("weights"):
        pieces = [torch.zeros(32 << 20, dtype=torch.uint8, device=device) for _ in range(200)]
    figures: Figures = {"gib": gib}
    for turn in range(3):
        figures[f"one piece, {turn}"] = raw_cycle(saver, "kv_cache", [whole])
        figures[f"200 of 32 MiB, {turn}"] = raw_cycle(saver, "weights", pieces)
    saver.close()
    return figures


def raw_cycle(saver: TorchMemorySaver, tag: MemoryTag, tensors: list[torch.Tensor]) -> Figures:
    """Milliseconds of unmapping, mapping and zeroing."""

    def zero() -> None:
        for tensor in tensors:
            tensor.zero_()

    actions = {
        "unmap": lambda: saver.release(tag, tensors),
        "map": lambda: saver.resume(tag, tensors),
        "zero": zero,
    }
    found = {}
    for name, action in actions.items():
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        found[name] = (time.perf_counter() - started) * 1e3
    return found


def show(title: str, figures: Figures) -> None:
    """One line a figure."""
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:20} {_short(value)}")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return "[" + ", ".join(_short(entry) for entry in value) + "]"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(entry)}" for name, entry in value.items())
    return str(value)


def measure(options: Options, model: str, parts: Parts) -> Figures:
    """All parts of one model."""
    name, found = Path(model).stem, {}
    expected: list[bytes] = []
    with parts.part(f"{name} plain"):
        expected, found["plain"] = plain_part(options, model)
    todo: dict[str, Callable[[Options, str, list[bytes]], Figures]] = {
        "backup": backup_part,
        "publish": publish_part,
        "paused": paused_part,
    }
    for title, run in todo.items():
        if expected:
            with parts.part(f"{name} {title}"):
                found[title] = run(options, model, expected)
                show(f"{name}, {title}", found[title])
    return found


def main(options: Options) -> int:
    """Measure every model, print, and write JSON if asked."""
    parts = Parts()
    print(f"{describe()}, torch {torch.__version__}")
    if torch.cuda.is_available():
        with parts.part("raw"):
            show("the saver alone, ms", raw_part(min(40, torch.cuda.mem_get_info()[0] >> 31)))
    figures = {Path(model).stem: measure(options, model, parts) for model in options.models}
    if options.json:
        record = {"machine": describe(), "torch": torch.__version__, "models": figures}
        Path(options.json).write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nfailed: {', '.join(parts.failed) or 'nothing'}")
    return int(bool(parts.failed))


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
