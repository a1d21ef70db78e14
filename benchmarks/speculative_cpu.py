"""What n-gram drafts give on a CPU, engines with and without them by turns.

    python benchmarks/speculative_cpu.py --json siblings.json

siblings: a task that repeats itself, 8 samples a prompt, which draft from each other. default: the
prompts of `cpu_rollout.py`, few-shot lines at temperature 1, with method 'auto' as a recipe runs
it, k by counts alone. What is sampled does not depend on the drafts; that is checked.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import cpu_rollout
import numpy as np
import tyro
from machine import describe
from speculative_engine import Bench, Draft, random_prompts

from engine.config import (
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
    SpeculativeConfig,
    SpeculativeMethod,
)
from engine.protocol import Request, RequestOutput
from rollout.offline import load_tokenizer

Part = Literal["siblings", "default"]
RECORDS = (
    "Anna Miller, born 1987 in Leeds, works as a nurse",
    "Peter Novak, born 1990 in Brno, works as a baker",
    "Maria Lopez, born 1979 in Toledo, works as a pilot",
    "James Brown, born 1984 in Bristol, works as a cook",
)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = cpu_rollout.DEFAULT_MODEL
    """Model to run; with --load-format random a config.json, and prompts are random ids."""
    load_format: Literal["auto", "random"] = "auto"
    """Where the weights come from."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """As the engine's option."""
    parts: tuple[Part, ...] = ("siblings", "default")
    """Parts, in order."""
    prompts: int = 4
    """Distinct prompts of siblings."""
    samples: int = 8
    """Samples a prompt."""
    output_tokens: int = 192
    """Tokens of a sample of siblings."""
    temperature: float = 0.3
    """Of siblings."""
    k: int = 3
    """Most drafts a row."""
    pairs: int = 3
    """Runs of either side."""
    json: str | None = None
    """Write the figures to this file."""


@dataclass(frozen=True)
class Work:
    """Prompts in int32 ids, sampled `samples` times each; method: of the side that drafts."""

    prompts: Sequence[np.ndarray]
    samples: int
    output_tokens: int
    temperature: float
    method: SpeculativeMethod

    def requests(self, bench: Bench, seed: int) -> list[Request]:
        """All samples, those of a prompt as one group."""
        return [
            request
            for nth, prompt in enumerate(self.prompts)
            for request in bench.requests(
                [prompt] * self.samples,
                Draft(),
                max_new_tokens=self.output_tokens,
                temperature=self.temperature,
                seed=1000 * seed + nth,
                group=f"{seed}-{nth}",
            )
        ]


def repeating(options: Options) -> list[np.ndarray]:
    """Records to be written again, one after the other: the answer is what was read."""
    if options.load_format == "random":
        return random_prompts(64, options.prompts, 24)
    tokenizer = load_tokenizer(options.model)
    lines = [f"Record {nth + 1}: {record}." for nth, record in enumerate(RECORDS)]
    prompts = []
    for nth in range(options.prompts):
        turned = lines[nth % len(lines) :] + lines[: nth % len(lines)]
        text = "\n".join(turned)
        prompts.append(f"{text}\n\nThe same records, copied again and again:\n\n{turned[0]}\n")
    return [np.array(tokenizer.encode(prompt), np.int32) for prompt in prompts]


def few_shot(options: Options) -> list[np.ndarray]:
    """The prompts of `cpu_rollout.py`."""
    if options.load_format == "random":
        return random_prompts(64, 2, 16)
    asked = cpu_rollout.Options(model=options.model)
    return [np.array(prompt, np.int32) for prompt in cpu_rollout.make_prompts(asked)]


def work_of(options: Options, part: Part) -> Work:
    """What a part runs."""
    if part == "siblings":
        prompts = repeating(options)
        return Work(prompts, options.samples, options.output_tokens, options.temperature, "ngram")
    tokens = min(64, options.output_tokens)
    return Work(few_shot(options), options.samples, tokens, 1.0, "auto")


def engine(options: Options, work: Work, method: SpeculativeMethod) -> Bench:
    """An engine of this process."""
    return Bench(
        EngineConfig(
            model=options.model,
            load_format=options.load_format,
            device="cpu",
            dtype=options.dtype,
            context_length=512,
            cache=CacheConfig(num_pages=2048),
            scheduler=SchedulerConfig(max_running=len(work.prompts) * work.samples),
            speculative=SpeculativeConfig(method=method, draft_tokens=options.k, pace="counts"),
        )
    )


def measure(options: Options, part: Part) -> dict[str, Any]:
    """Runs by turns: tokens per second of either side, their ratio, and what was accepted."""
    work = work_of(options, part)
    benches = {name: engine(options, work, name) for name in ("off", work.method)}
    rates: dict[str, list[float]] = {name: [] for name in benches}
    same, outputs = 0.0, {}
    for run in range(options.pairs + 1):
        for name in benches if run % 2 == 0 else reversed(list(benches)):
            outputs[name], seconds = _timed(benches[name], work, run)
            if run:
                rates[name].append(_num_tokens(outputs[name]) / seconds)
        same += _share_same(outputs["off"], outputs[work.method]) / (options.pairs + 1)
    for bench in benches.values():
        bench.close()
    medians = {name: statistics.median(found) for name, found in rates.items()}
    specs = [output.spec for output in outputs[work.method] if output.spec is not None]
    return {
        "method": work.method,
        "tokens_per_s": rates,
        "ratio": medians[work.method] / medians["off"],
        "spread": (max(rates["off"]) - min(rates["off"])) / medians["off"],
        "drafted": sum(spec.drafted for spec in specs),
        "accepted": sum(spec.accepted for spec in specs),
        "tokens": _num_tokens(outputs[work.method]),
        "same": same,
    }


def _timed(bench: Bench, work: Work, seed: int) -> tuple[list[RequestOutput], float]:
    bench.flush()
    started = time.perf_counter()
    outputs = bench.run(work.requests(bench, seed))
    return outputs, time.perf_counter() - started


def _num_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(output.token_ids) for output in outputs)


def _share_same(left: Sequence[RequestOutput], right: Sequence[RequestOutput]) -> float:
    """Share of the samples that have equal tokens."""
    pairs = zip(left, right, strict=True)
    return float(np.mean([np.array_equal(a.token_ids, b.token_ids) for a, b in pairs]))


def main() -> None:
    """Measure, print and write."""
    options = tyro.cli(Options, description=__doc__)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": describe(),
        "options": asdict(options) | {"json": None},
        "parts": {},
    }
    print(describe())
    for part in options.parts:
        row = report["parts"][part] = measure(options, part)
        print(
            f"{part}: {row['method']} / off {row['ratio']:.3f} (spread {row['spread']:.3f}), "
            f"{row['accepted']} of {row['drafted']} drafts accepted in {row['tokens']} tokens, "
            f"{100 * row['same']:.1f}% of the samples the same",
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
