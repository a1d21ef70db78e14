"""One rank of `benchmarks/collectives.py`: `collectives_rank.py JOB OUT`, the job as JSON."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import torch
from collectives_ops import OPS, Inputs, Peers, timed_ops, tuned_ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTHS = (2, 62, 1022, 4096, 12290, 65536, 262144, 1 << 20, (1 << 21) - 6, (5 << 20) + 6)


class Rank:
    """Runs the parts, and tells what it found if it is rank 0."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.peers = Peers(job["rank"], job["gpus"], job["place"])
        self.results: dict[str, Any] = {"failed": 0, "description": self.peers.group.description}
        self.say(f"collectives: {self.peers.group.description}")

    def say(self, text: str) -> None:
        if self.job["rank"] == 0:
            print(text, flush=True)

    def run(self, part: str) -> None:
        """One part; an error of it is reported. The other ranks may then miss a collective, so
        all of them stop."""
        started = time.monotonic()
        self.say(f"--- {part}")
        try:
            getattr(self, part)()
        except Exception:
            self.results["failed"] += 1
            print(f"rank {self.job['rank']} failed in {part}:", flush=True)
            traceback.print_exc()
            raise
        self.say(f"{part}: {time.monotonic() - started:.1f} s")

    def bits(self) -> None:
        """Every op twice, on inputs that are known to all ranks."""
        count = 0
        for dtype in DTYPES:
            for length in LENGTHS:
                for name, op in OPS.items():
                    if not op.takes(length, dtype, self.peers):
                        continue
                    for repeat in range(3):
                        inputs = Inputs.drawn(self.peers, op, length, dtype, count)
                        want, got = op.want(inputs, self.peers), op.run(inputs, self.peers)
                        _require_equal(f"{name} {dtype} {length} ({repeat})", got, want)
                        count += 1
        self.peers.meet()
        self.say(f"bits: {count} results equal to the references'")
        self.results["bits"] = count

    def stress(self) -> None:
        """Replays of one graph, in which every op is called with inputs that change."""
        rng = random.Random(self.job["rank"])
        step = torch.zeros((), dtype=torch.int32, device="cuda")
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        cases = []
        for length in (4096, 32768, 262144, 1 << 20):
            for op in OPS.values():
                if op.takes(length, torch.bfloat16, self.peers):
                    inputs = Inputs.drawn(self.peers, op, length, torch.bfloat16, length)
                    cases.append((op, inputs, op.run(inputs, self.peers)))
        self.peers.meet()

        def calls() -> None:
            step.add_(1)
            for number, (op, inputs, _) in enumerate(cases):
                changed = inputs.at(step)
                if (number + self.job["rank"]) % 3 == 0:
                    torch.cuda._sleep(10_000 * (number % 4))
                for got, want in zip(
                    op.run(changed, self.peers), op.want(changed, self.peers), strict=True
                ):
                    wrong.add_((got != want).sum())

        graph = _captured(calls)
        for replay in range(self.job["replays"]):
            if rng.random() < 0.3:
                torch.cuda._sleep(rng.randrange(1, 400_000))
            if rng.random() < 0.02:
                time.sleep(rng.random() * 0.01)
            graph.replay()
            if replay % 500 == 499:
                torch.cuda.synchronize()
                self.say(
                    f"stress: {replay + 1} replays of {len(cases)} calls, {wrong.item()} wrong"
                )
        torch.cuda.synchronize()
        if wrong.item():
            raise AssertionError(f"{wrong.item()} elements were wrong")
        self.results["stress"] = {"replays": self.job["replays"], "calls": len(cases)}
        self.peers.meet()

    def time(self) -> None:
        """Microseconds a call, the slowest rank's, best of five replays."""
        self._table(timed_ops(self.peers, self.job["rows"], self.job["width"]), "time")

    def tune(self) -> None:
        """Likewise, of every cut."""
        self._table(tuned_ops(self.peers, self.job["rows"], self.job["width"]), "tune")

    def _table(self, calls: Iterator[tuple[str, Callable[[], Any]]], part: str) -> None:
        figures = self.results.setdefault(part, {})
        for name, call in calls:
            microseconds = self._graph_us(call)
            figures[name] = microseconds
            self.say(f"{name:<44}{microseconds:9.2f} us")

    def _graph_us(self, call: Callable[[], Any], repeats: int = 100) -> float:
        def calls() -> None:
            for _ in range(repeats):
                call()

        graph = _captured(calls)
        best = float("inf")
        for _ in range(5):
            self.peers.meet()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            mine = start.elapsed_time(end) * 1e3 / repeats
            best = min(best, self.peers.largest(mine))
        return best

    def abort(self) -> None:
        """Rank 0 waits for the others, who do not come, until it gives them up."""
        op = OPS["one shot"]
        inputs = Inputs.drawn(self.peers, op, 4096, torch.bfloat16, 0)
        op.run(inputs, self.peers)
        self.peers.meet()
        if self.job["rank"]:
            self.peers.group.minimum(0)
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(50):
                op.run(inputs, self.peers)
        graph.replay()
        ended, ended_at = threading.Event(), [0.0]

        def wait() -> None:
            torch.cuda.synchronize(self.peers.rank)
            ended_at[0] = time.monotonic()
            ended.set()

        threading.Thread(target=wait, daemon=True).start()
        if ended.wait(1.0):
            raise AssertionError("a collective that nobody joined has ended")
        started = time.monotonic()
        self.peers.give_up()
        if not ended.wait(20.0):
            raise AssertionError("the waits did not end when they were given up")
        self.results["abort_s"] = ended_at[0] - started
        self.say(f"abort: 50 calls of a graph ended after {self.results['abort_s'] * 1e3:.1f} ms")
        self.peers.group.minimum(0)


def _captured(calls: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of `calls`, which ran before."""
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        calls()
    return graph


def _require_equal(name: str, got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        if not torch.equal(one, other):
            different = (one != other).flatten()
            where = int(different.nonzero()[0])
            raise AssertionError(
                f"{name}: {int(different.sum())} of {one.numel()} differ, first at {where}: "
                f"{one.flatten()[where].item()}, not {other.flatten()[where].item()}"
            )


def main() -> int:
    job = json.loads(sys.argv[1])
    torch.cuda.set_device(job["rank"])
    with torch.inference_mode():
        rank = Rank(job)
        try:
            for part in job["parts"]:
                rank.run(part)
        except Exception:
            rank.peers.give_up()
            return 1
        finally:
            rank.peers.group.close()
            if job["rank"] == 0:
                Path(sys.argv[2]).write_text(json.dumps(rank.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
