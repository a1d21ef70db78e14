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
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
import tyro
from machine import describe
from sleep_engine import Bench, Figures, Options, device_used, first_steps, train
from sleep_memory import pinned_copy_ms, raw_part

from engine.executor import read_checkpoint
from engine.protocol import MemoryTag, Pause, ReleaseMemory, Resume, ResumeMemory


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
