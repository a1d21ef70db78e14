"""What an in-place weight update costs, beside the least that it could.

    python benchmarks/weight_update.py --model shapes/qwen2.5-7b.json --transport cuda_ipc
    python benchmarks/weight_update.py --model ... --transport nccl              (two GPUs)
    python benchmarks/weight_update.py --model ... --transport nccl --trainers 2 --tp 2 --zero3
    python benchmarks/sharded_update.py --model ...    (whatever GPUs there are, every way and mode)

The engine runs in this process and decodes `--rows` requests all the while; trainer ranks are
processes of their own (`weight_update_trainer.py`), on the GPUs behind the engine's, or on the
same one for CUDA IPC. Update commands arrive over a pipe and are handled between steps.

push: the trainer's wall time from begin to the commit's reply, decode going on.
busy: time of the update's commands that run between steps, from a step boundary (no step in
flight, GPU idle) to where the next step could be launched, added up over one update. What runs
beside steps is not in it, unless the engine is idle; `commands` has all of them.
stall: longest time between two steps' results during an update.
floor: with cuda_ipc a device-to-device copy of the same bytes; with nccl one broadcast of a flat
buffer of equal size from trainer 0 to the engine's first rank, both measured in the same run.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import numpy as np
import torch
import tyro
from machine import describe
from weight_update_trainer import RawGroup, TensorList, TrainerJob, free_port, run_trainer

from engine.config import (
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    Quantization,
    SchedulerConfig,
)
from engine.errors import SlipstreamError
from engine.protocol import (
    BeginUpdate,
    BesideSteps,
    CommitUpdate,
    GetState,
    GroupCommand,
    Request,
    SamplingParams,
)
from rollout.launch import launch


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str
    """A config.json."""
    transport: Literal["cuda_ipc", "nccl", "disk"] = "cuda_ipc"
    """How the weights travel; on a CPU gloo and shared memory take the place of NCCL and IPC."""
    trainers: int = 1
    """Trainer ranks; more than one sends shards, each rank its own."""
    way: Literal["", "auto", "excerpts", "broadcasts"] = ""
    """How shards travel; see `ShardedCarrier`. By default auto, and a single trainer rank sends
    everything by one broadcast."""
    check: bool = False
    """Compare what the engine stores after the first update with what it should, to the bit."""
    zero3: bool = False
    """Trainer ranks hold a module that DeepSpeed partitioned, not plain tensors."""
    tp: int = 1
    """Tensor-parallel ranks of the engine."""
    quantization: Quantization = "none"
    """What the engine stores linear weights as; the trainer sends bfloat16."""
    updates: int = 8
    """Updates to time, after two that warm up."""
    cycles: int = 0
    """Further updates, over which the memory of both sides is watched."""
    rows: int = 16
    """Requests that decode meanwhile; 0 for an idle engine."""
    checksums: bool = False
    """Verify every tensor's checksum."""
    mode: Literal["auto", "shadow", "undo", "in_place"] = "auto"
    """Whether tensors wait beside the live weights, or are written at once; see `BeginUpdate`."""
    device: Literal["auto", "cpu"] = "auto"
    """'cpu' for a smoke test."""
    json: str | None = None
    """Write the figures to this file."""


class Engine:
    """The engine, the commands that come in, and what they cost."""

    def __init__(self, options: Options, device: str) -> None:
        self.options = options
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        self.replica = launch(
            EngineConfig(
                model=options.model,
                load_format="random",
                device="cpu" if device == "cpu" else "cuda",
                dtype="float32" if device == "cpu" else "bfloat16",
                context_length=512 if device == "cpu" else 4096,
                cache=CacheConfig(memory_bytes=(64 << 20) if device == "cpu" else (4 << 30)),
                scheduler=SchedulerConfig(max_running=max(options.rows, 1)),
                quantization=options.quantization,
                parallel=ParallelConfig(tp_size=options.tp),
            )
        )
        self.busy: list[float] = []
        self.commands: list[list[tuple[str, float]]] = []
        self.stalls: list[float] = []
        self.used_before = 0
        self.step_s: list[float] = []
        self._last_step = time.perf_counter()
        self._updating = False
        self._next_rid = 0

    def model(self) -> Any:
        """The engine's own model, for names and shapes."""
        executor = self.replica._leader._executor
        return getattr(executor, "_worker", None) or executor._local._worker

    def manifest(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, full shape) of every tensor, for the trainer to make."""
        model = self.model()._model
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        return [
            (name, dtype, parameter.parts[key].full_shape)
            for name, (parameter, key) in model.weight_index().items()
        ]

    def serve(self, pipe: Connection) -> Any:
        """Decode and obey until the trainer says that it is done; returns what it says."""
        while True:
            if pipe.poll(0 if self.options.rows else 0.01):
                message = pipe.recv()
                if message[0] == "done":
                    return message[1]
                pipe.send(self._obey(message[1]))
            elif self.options.rows:
                self._step()

    def _step(self) -> None:
        if self.replica.idle():
            self.replica.submit([self._request() for _ in range(self.options.rows)])
        self.replica.step()
        now = time.perf_counter()
        if self._updating:
            self.stalls[-1] = max(self.stalls[-1], now - self._last_step)
        else:
            self.step_s.append(now - self._last_step)
        self._last_step = now

    def _obey(self, command: Any) -> Any:
        beside = isinstance(command, BesideSteps | GetState) and self.options.rows > 0
        if not beside:
            self.replica._leader._drain()
            self.synchronize()
        if isinstance(command, BeginUpdate):
            self._updating = True
            self.busy.append(0.0)
            self.stalls.append(0.0)
            self.commands.append([])
            if len(self.busy) == self.options.updates + 3:
                self.used_before = self.used_bytes()
        started = time.perf_counter()
        try:
            reply: Any = self._beside(command) if beside else self.replica.send(command)
        except SlipstreamError as error:
            reply = error
        if not beside:
            self.synchronize()
        spent = time.perf_counter() - started
        if self.busy:
            self.commands[-1].append((type(command).__name__, spent))
            if not beside and not isinstance(command, GroupCommand):
                self.busy[-1] += spent
        if isinstance(command, CommitUpdate) and self.options.rows:
            self._step()
            self._updating = False
        return reply

    def _beside(self, command: Any) -> Any:
        ticket = self.replica._leader.start(command)
        while not ticket.done():
            self._step()
        return ticket.result()

    def _request(self) -> Request:
        self._next_rid += 1
        vocab = self.replica.state().vocab_size
        length = self.replica.state().context_length - 64
        return Request(
            rid=str(self._next_rid),
            prompt_ids=np.arange(8, dtype=np.int32) % vocab,
            sampling=SamplingParams(max_new_tokens=length, ignore_eos=True),
            seed=self._next_rid,
        )

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def used_bytes(self) -> int:
        """Memory of the device in use by anybody, or this process's own on a CPU."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return total - free
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def copy_seconds(num_bytes: int, device: torch.device) -> float:
    """A device-to-device copy of `num_bytes`, median of 5; on a CPU a memcpy."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def trainer_jobs(options: Options, engine: Engine, device: str, raw_port: int) -> list[TrainerJob]:
    """What each trainer rank is to do, and where."""
    same_gpu = options.transport != "nccl"
    port = free_port()
    return [
        TrainerJob(
            rank=rank,
            world_size=options.trainers,
            port=port,
            raw_port=raw_port,
            device=device,
            gpu=0 if same_gpu else options.tp + rank,
            tensors=engine.manifest(),
            transport=options.transport,
            updates=options.updates + 2,
            cycles=options.cycles,
            checksums=options.checksums,
            mode=options.mode,
            zero3=options.zero3,
            way=options.way,
            check=options.check,
        )
        for rank in range(options.trainers)
    ]


def measure(options: Options) -> dict[str, Any]:
    """Run the updates and gather every figure."""
    on_gpu = options.device == "auto" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    engine = Engine(options, device)
    raw_port = free_port()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    jobs = trainer_jobs(options, engine, device, raw_port)
    processes = [
        context.Process(target=run_trainer, args=(job, theirs if job.rank == 0 else None))
        for job in jobs
    ]
    for process in processes:
        process.start()
    theirs.close()
    num_bytes = TensorList.num_bytes_of(jobs[0].tensors)
    try:
        if options.transport == "nccl":
            with RawGroup(1, raw_port, engine.device) as group:
                floor = group.measure(num_bytes)
        theirs_report = engine.serve(pipe)
        memory = (engine.used_before, engine.used_bytes())
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    if options.transport != "nccl":
        floor = copy_seconds(num_bytes, engine.device)
    engine.replica.close()
    return figures(options, engine, theirs_report, num_bytes, floor, memory)


def figures(
    options: Options,
    engine: Engine,
    report: dict[str, Any],
    num_bytes: int,
    floor: float,
    memory: tuple[int, int],
) -> dict[str, Any]:
    """Medians over the timed updates."""
    timed = slice(2, 2 + options.updates)
    push, busy = statistics.median(report["push_s"][timed]), statistics.median(engine.busy[timed])
    result = {
        "num_bytes": num_bytes,
        "floor_s": floor,
        "push_s": push,
        "busy_s": busy,
        "push_over_floor": push / floor,
        "busy_over_floor": busy / floor,
        "step_s": statistics.median(engine.step_s) if engine.step_s else None,
        "stall_s": max(engine.stalls[timed]) if options.rows else None,
        "first_stall_s": engine.stalls[0] if options.rows else None,
        "first_commands": engine.commands[0],
        "commands": engine.commands[1 + options.updates],
        "pushes_s": report["push_s"][timed],
        "first_push_s": report["push_s"][0],
        "engine_memory": memory,
        "trainer_memory": report["memory"],
    }
    return result


def show(options: Options, result: dict[str, Any]) -> None:
    """Print the table."""
    print(
        f"{Path(options.model).stem}, {options.transport}, {options.trainers} trainer rank(s), "
        f"TP {options.tp}: {result['num_bytes'] / 1e9:.2f} GB on {describe()}\n"
        f"  floor {1e3 * result['floor_s']:.2f} ms; push {1e3 * result['push_s']:.2f} ms "
        f"({result['push_over_floor']:.2f}x); engine busy {1e3 * result['busy_s']:.2f} ms "
        f"({result['busy_over_floor']:.2f}x); first push {1e3 * result['first_push_s']:.0f} ms"
    )
    if result["stall_s"] is not None:
        print(
            f"  decode step {1e3 * result['step_s']:.2f} ms, longest between results during an "
            f"update {1e3 * result['stall_s']:.2f} ms"
        )
    for key in ("first_commands", "commands"):
        spent = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in result[key])
        print(f"  {key.replace('_', ' ')}, ms: {spent}")
    if options.cycles:
        for side in ("engine_memory", "trainer_memory"):
            before, after = result[side]
            print(
                f"  {side.replace('_', ' ')} {before / 2**20:.0f} -> {after / 2**20:.0f} MiB over "
                f"{options.cycles} cycles ({100 * (after / before - 1):+.2f}%)"
            )


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options)
    result = measure(options)
    show(options, result)
    if options.json:
        report = {
            "machine": describe(),
            "torch": torch.__version__,
            "options": {
                **{k: v for k, v in asdict(options).items() if k != "json"},
                "model": Path(options.model).name,
            },
            **result,
        }
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
