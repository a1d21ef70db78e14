"""What a prompt program costs beside the same requests by hand, and what its forks share.

    python benchmarks/programs.py --json benchmarks/results/programs-epyc.json

Every question is a prompt, a plan, and branches that go on from it with a hint each. The program
runs by `Runner.run_batch`; by hand, the same `/generate` objects go to the same replica in
two waves, by `expand`, `generate` and `respond`, with ids that are put together in plain Python.
The sides take turns, with the prefix cache flushed before each.

model: a real one. Both sides must return the same tokens. paced: an engine whose steps take 10 ms
each, as a GPU's do, and draw anything; 32 questions at once and replies of 128 tokens: what a
program adds to the wall time. free: the same in no time, with replies of 16: what it adds to the
processor time of a request.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import msgspec
import tyro
from machine import describe
from over_http_mock import MockExecutor

from engine.config import CacheConfig, EngineConfig
from engine.protocol import FlushCache, GenerateRequest, GenerateResponse, SamplingParams
from rollout.launch import launch
from rollout.offline import Tokenizer, expand, generate, load_tokenizer, respond
from rollout.program import Generated, Runner, State
from rollout.replica.base import Replica
from rollout.replica.inline import InlineReplica

Part = Literal["model", "paced", "free"]
STEP_S = {"paced": 0.01, "free": 0.0}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    only: tuple[Part, ...] = ("model", "paced", "free")
    """Parts, in order."""
    model: str = ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
    """What generates."""
    questions: int = 2
    """Programs at once."""
    branches: int = 4
    """Forks of each."""
    tokens: int = 8
    """Tokens of every reply."""
    words: int = 200
    """Words of every question."""
    rounds: int = 2
    """Times that each side is measured, after one that warms up."""
    json: Path | None = None
    """Write the figures to this file."""


HINT = " Hint number {}: think of it as"


@dataclass(frozen=True)
class Replies:
    """Those of one question. prefix: tokens that its branches have in common."""

    plan: Generated
    tries: list[Generated]
    prefix: int


async def program(s: State, question: str, options: Options) -> Replies:
    """The workload as a program."""
    s.add(question)
    plan = await s.gen("plan", max_new_tokens=options.tokens, ignore_eos=True)
    prefix = len(s.token_ids)

    async def step(branch: State, number: int) -> Generated:
        branch.add(HINT.format(number))
        return await branch.gen("try", max_new_tokens=options.tokens, ignore_eos=True)

    tries = await s.fork(options.branches).run(step, range(options.branches))
    return Replies(plan, tries, prefix)


def by_hand(
    replica: Replica,
    tokenizer: Tokenizer,
    questions: list[str],
    seeds: list[tuple[int, list[int]]],
    options: Options,
) -> list[tuple[str, list[str]]]:
    """The same in two waves; the texts."""
    state = replica.state()

    def ask(wave: list[tuple[list[int], int]]) -> list[GenerateResponse]:
        wires = [
            GenerateRequest(
                input_ids=ids,
                sampling_params=SamplingParams(
                    max_new_tokens=options.tokens, ignore_eos=True, sampling_seed=seed
                ),
                return_logprob=True,
            )
            for ids, seed in wave
        ]
        requests = [expand(wire, tokenizer, state, 0)[0] for wire in wires]
        found = generate(replica, requests, tokenizer=tokenizer)
        return [
            respond(wire, request, output, tokenizer)
            for wire, request, output in zip(wires, requests, found, strict=True)
        ]

    prompts = [tokenizer.encode(question) for question in questions]
    plans = ask([(ids, seed) for ids, (seed, _) in zip(prompts, seeds, strict=True)])
    wave = []
    for ids, plan, (_, each) in zip(prompts, plans, seeds, strict=True):
        for number, seed in enumerate(each):
            hint = tokenizer.encode(HINT.format(number), add_special_tokens=False)
            wave.append((ids + plan.output_ids + hint, seed))
    tries = [found.text or "" for found in ask(wave)]
    size = options.branches
    return [
        (plan.text or "", tries[place * size : (place + 1) * size])
        for place, plan in enumerate(plans)
    ]


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, the seconds, and the seconds of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def measure(options: Options, replica: Replica, *, same: bool) -> dict[str, Any]:
    """Both sides in turns. same: they draw the same tokens."""
    tokenizer = load_tokenizer(options.model)
    runner = Runner.of_replica(replica, tokenizer)
    questions = [
        " ".join(f"word{n * i % 97}" for i in range(options.words))
        for n in range(1, options.questions + 1)
    ]
    arguments = [{"question": question, "options": options} for question in questions]
    walls: dict[str, list[float]] = {"program": [], "by_hand": []}
    cpus: dict[str, list[float]] = {"program": [], "by_hand": []}
    shares: list[float] = []
    for round_number in range(options.rounds + 1):
        replica.send(FlushCache())
        found, wall, cpu = timed(lambda: runner.run_batch(program, arguments))
        seeds = [(each.plan.seed, [reply.seed for reply in each.tries]) for each in found]
        replica.send(FlushCache())
        hand, hand_wall, hand_cpu = timed(
            lambda seeds=seeds: by_hand(replica, tokenizer, questions, seeds, options)
        )
        texts = [(each.plan.text, [reply.text for reply in each.tries]) for each in found]
        assert not same or texts == hand, "the sides drew other tokens"
        shares += [
            min(reply.cached_tokens, each.prefix) / each.prefix
            for each in found
            for reply in each.tries
        ]
        if round_number:
            for name, one_wall, one_cpu in (
                ("program", wall, cpu),
                ("by_hand", hand_wall, hand_cpu),
            ):
                walls[name].append(one_wall)
                cpus[name].append(one_cpu)
        sys.stderr.write(
            f"program {wall:.3f} s ({cpu:.3f}), by hand {hand_wall:.3f} s ({hand_cpu:.3f})\n"
        )
    requests = options.questions * (1 + options.branches)
    ratios = [p / h for p, h in zip(cpus["program"], cpus["by_hand"], strict=True)]
    return {
        "requests": requests,
        "wall_s": {name: statistics.median(times) for name, times in walls.items()},
        "processor_s": {name: statistics.median(times) for name, times in cpus.items()},
        "wall_ratio": statistics.median(
            p / h for p, h in zip(walls["program"], walls["by_hand"], strict=True)
        ),
        "processor_ratio": statistics.median(ratios),
        "processor_ratios": ratios,
        "prefix_reused": {"least": min(shares), "mean": statistics.mean(shares)},
    }


def part(name: Part, options: Options) -> dict[str, Any]:
    """The figures of one engine."""
    config = EngineConfig(
        model=options.model,
        device="cpu",
        context_length=2048,
        cache=CacheConfig(memory_bytes=1 << 30),
    )
    if name == "model":
        with launch(config) as replica:
            return measure(options, replica, same=True)
    paced = replace(config, model=f"mock@{STEP_S[name]}")
    executor = MockExecutor(paced)
    executor.facts = msgspec.structs.replace(executor.facts, vocab_size=1 << 20)
    many = replace(
        options,
        questions=16 * options.questions,
        rounds=4 * options.rounds,
        tokens=128 if name == "paced" else 16,
    )
    with InlineReplica(paced, executor) as replica:
        found = measure(many, replica, same=False)
    seconds = found["processor_s"]
    added = (seconds["program"] - seconds["by_hand"]) / found["requests"]
    return {**found, "added_us_a_request": 1e6 * added}


def main() -> None:
    """Print the figures, and write them where asked."""
    options = tyro.cli(Options)
    shown = {**asdict(options), "model": Path(options.model).name, "json": None}
    whole = {"machine": describe(), "options": shown}
    for name in options.only:
        whole[name] = part(name, options)
        if options.json:
            options.json.write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole, indent=2))


if __name__ == "__main__":
    main()
