"""Speculative decoding: what drafting costs where it cannot help, and how near to its bound it
comes where a share of the drafts is accepted by force.

    python benchmarks/speculative.py --model benchmarks/shapes/qwen2.5-1.5b.json
    python benchmarks/speculative.py --model benchmarks/shapes/qwen3-8b.json --parts forced \
        --batches 1

forced: tokens per second with forced acceptance over those of plain decoding, as a share of
tau * T(B) / (T_v + k * T_d): T(B) is the plain step of this run, T_v the larger of T(B) and the
products of B * (k + 1) rows at the machine's own rate, T_d the n-gram kernel. off: an engine that
may draft and is asked not to, against one without drafting. adaptive: method 'auto' against plain
decoding of the same engine. tail: time to the last token of 512 requests of lognormal lengths.
Sides alternate; every graph is captured before it is timed, and captures within a timed window are
reported. `speculative_cpu.py` measures on a CPU what siblings give.

Tokens of forced rows mean nothing: the weights are random ones and only times are measured.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import checkout  # noqa: F401
import numpy as np
import torch
import tyro
from gpu_rollout import ceilings, model_bytes
from gpu_rollout_previous import model_name
from machine import describe
from speculative_check import check
from speculative_engine import (
    PLAIN,
    Bench,
    Draft,
    Window,
    acceptance_for,
    random_prompts,
)

from engine.config import GIB, CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig

Part = Literal["forced", "off", "adaptive", "tail"]
Method = Literal["off", "ngram", "auto"]


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = "benchmarks/shapes/qwen2.5-1.5b.json"
    """A config.json, or a model with its weights (then set --load-format auto)."""
    load_format: Literal["auto", "random"] = "random"
    """Where the weights come from."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu tries the script itself; its figures say little."""
    dtype: Literal["auto", "float32"] = "auto"
    """As the engine's option."""
    parts: tuple[Part, ...] = ("forced", "off", "tail")
    """Parts, in order."""
    batches: tuple[int, ...] = (1, 4, 16, 64)
    """Rows of forced."""
    off_batches: tuple[int, ...] = (1, 16, 64, 256)
    """Rows of off."""
    adaptive_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Rows of adaptive."""
    acceptances: tuple[float, ...] = (0.0, 0.2, 0.5, 0.8)
    """Acceptance of a draft in adaptive."""
    tail_methods: tuple[Method, ...] = ("ngram", "auto")
    """Sides of tail beside plain decoding, which runs once a method."""
    tail_shorten: int = 1
    """Divide the output lengths of tail by this."""
    tail_requests: int = 512
    """Requests of tail."""
    k: int = 3
    """Drafts a row."""
    tau: float = 3.0
    """Tokens a verify on average, in forced and tail."""
    prompt_tokens: int = 512
    """Tokens of a prompt."""
    output_tokens: int = 256
    """Tokens a row within a window."""
    pairs: int = 3
    """Windows of either side."""
    kv_memory: float = 0.0
    """GiB of KV of the engine that drafts; 0: 40 where there is a tail, else 12."""
    json: str | None = None
    """Write the figures to this file."""


class Engines:
    """Engines by method, kept between parts; at most two live at once."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._benches: dict[Method, Bench] = {}

    def get(self, method: Method, beside: Method | None = None) -> Bench:
        """The engine of a method; another one's memory is freed, but for that of `beside`."""
        for other in [key for key in self._benches if key not in (method, beside)]:
            self._benches.pop(other).close()
        if method not in self._benches:
            self._benches[method] = Bench(self._config(method))
        return self._benches[method]

    def close(self) -> None:
        """Free all of them."""
        for bench in self._benches.values():
            bench.close()
        self._benches.clear()

    def _config(self, method: Method) -> EngineConfig:
        options = self._options
        has_tail = "tail" in options.parts
        gib = options.kv_memory or (40.0 if has_tail else 12.0)
        on_gpu = options.device == "cuda"
        memory_bytes = int((12.0 if method == "off" else gib) * GIB) if on_gpu else None
        return EngineConfig(
            model=options.model,
            load_format=options.load_format,
            device=options.device,
            dtype=options.dtype,
            context_length=_context(options),
            cache=CacheConfig(memory_bytes=memory_bytes, num_pages=None if on_gpu else 1024),
            scheduler=SchedulerConfig(max_running=_most_rows(options)),
            speculative=SpeculativeConfig(
                method=method, draft_tokens=options.k, allow_forced_acceptance=method != "off"
            ),
        )


def _most_rows(options: Options) -> int:
    wanted: dict[Part, int] = {
        "forced": max(options.batches),
        "off": max(options.off_batches),
        "adaptive": max(options.adaptive_batches),
        "tail": options.tail_requests,
    }
    return max(wanted[part] for part in options.parts)


def _context(options: Options) -> int:
    window = options.prompt_tokens + 2 * options.output_tokens + 256
    longest = int(_tail_lens(options).max()) if "tail" in options.parts else 0
    return max(window, options.prompt_tokens + longest + 64)


def _tail_lens(options: Options) -> np.ndarray:
    """Lognormal, median 1,024, sigma 1, at most 16k tokens; always the same."""
    drawn = np.random.default_rng(0).standard_normal(options.tail_requests)
    lens = np.minimum(1024.0 * np.exp(drawn), 16384.0)
    return np.maximum(lens / options.tail_shorten, 4).astype(np.int64)


class Measurement:
    """One run of the script: engines, prompts and what was found."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.engines = Engines(options)
        on_gpu = options.device == "cuda"
        first = self.engines.get("ngram")
        facts = first.executor.facts
        is_gguf = options.model.endswith(".gguf")
        self.params = (
            facts.num_parameters if is_gguf else _product_params(options, facts.num_parameters)
        )
        self.rates = ceilings() if on_gpu else {"gemm_flop_per_s": _cpu_rate()}
        if on_gpu:
            torch.cuda.empty_cache()
        self.prompts = random_prompts(facts.vocab_size, _most_rows(options), options.prompt_tokens)
        self.report: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "machine": describe(),
            "torch": torch.__version__,
            "options": asdict(options) | {"model": model_name(options.model), "json": None},
            "attention": facts.attention,
            "dtype": facts.dtype,
            "ceilings": self.rates,
        }
        print(
            f"{describe()}, torch {torch.__version__}, {model_name(options.model)} {facts.dtype}, "
            f"attention {facts.attention}, products {self.rates['gemm_flop_per_s'] / 1e12:.1f} "
            f"TFLOP/s"
        )

    def alternate(
        self, sides: dict[str, Callable[[], Window]], *, warm: bool = True
    ) -> dict[str, list[Window]]:
        """`pairs` windows of each side by turns, the order changing, behind one that warms up."""
        found: dict[str, list[Window]] = {name: [] for name in sides}
        if warm:
            for side in sides.values():
                side()
        for pair in range(self.options.pairs):
            for name in sides if pair % 2 == 0 else reversed(list(sides)):
                found[name].append(sides[name]())
        return found

    def side(self, bench: Bench, rows: int, draft: Draft) -> Callable[[], Window]:
        """A window of the first prompts."""
        return lambda: bench.window(self.prompts[:rows], draft, self.options.output_tokens)

    def forced(self) -> None:
        """Forced acceptance against plain decoding, as a share of the ideal."""
        options, bench = self.options, self.engines.get("ngram")
        p = acceptance_for(options.tau, options.k)
        print(f"forced acceptance {p:.4f}, k {options.k}: share of tau T / (T_v + k T_d)")
        print(
            f"{'rows':>6}{'plain/s':>10}{'forced/s':>10}{'spread':>8}{'tau':>7}{'T ms':>8}", end=""
        )
        print(
            f"{'step ms':>9}{'T_v ms':>8}{'T_d us':>8}{'ratio':>7}{'ideal':>7}{'share':>7}  one T_d"
        )
        rows_of_part = self.report["forced"] = []
        for rows in options.batches:
            sides = {
                "plain": self.side(bench, rows, PLAIN),
                "forced": self.side(bench, rows, Draft(forced_acceptance=p)),
            }
            row = self._forced_row(bench, rows, self.alternate(sides))
            rows_of_part.append(row)
            print(
                f"{rows:>6}{row['plain_tokens_per_s']:10,.0f}{row['forced_tokens_per_s']:10,.0f}"
                f"{row['plain_spread']:8.3f}{row['tau']:7.3f}{row['plain_ms']:8.3f}"
                f"{row['forced_ms']:9.3f}{row['verify_ms']:8.3f}{row['draft_us']:8.1f}"
                f"{row['ratio']:7.3f}{row['ideal']:7.3f}{row['share']:7.3f}"
                f"{row['share_one_draft']:9.3f}{_captures(row)}",
                flush=True,
            )

    def _forced_row(
        self, bench: Bench, rows: int, found: dict[str, list[Window]]
    ) -> dict[str, Any]:
        options = self.options
        plain, forced = _median(found["plain"]), _median(found["forced"])
        tau = statistics.mean(window.tau for window in found["forced"])
        step_s = plain.step_ms * 1e-3
        products_s = 2 * self.params * rows * (options.k + 1) / self.rates["gemm_flop_per_s"]
        verify_s = max(step_s, products_s)
        draft_s = 1e-6 * bench.draft_us(self.prompts[:rows], options.k)
        ratio = forced.tokens_per_s / plain.tokens_per_s
        ideal, once = (tau * step_s / (verify_s + n * draft_s) for n in (options.k, 1))
        return _sides(found) | {
            "rows": rows,
            "tau": tau,
            "plain_ms": plain.step_ms,
            "forced_ms": forced.step_ms,
            "verify_ms": 1e3 * verify_s,
            "draft_us": 1e6 * draft_s,
            "ratio": ratio,
            "ideal": ideal,
            "share": ratio / ideal,
            "share_one_draft": ratio / once,
        }

    def off(self) -> None:
        """What it costs to be able to draft where no request wants it."""
        bench = self.engines.get("ngram", beside="off")
        plain = self.engines.get("off", beside="ngram")
        print("k = 0 on an engine that may draft, against one that may not")
        print(f"{'rows':>6}{'off/s':>10}{'k=0/s':>10}{'ratio':>8}{'spread':>8}")
        rows_of_part = self.report["off"] = []
        for rows in self.options.off_batches:
            sides = {
                "plain": self.side(plain, rows, Draft()),
                "zero": self.side(bench, rows, PLAIN),
            }
            self._ratio_row(rows_of_part, rows, self.alternate(sides), "zero", {})

    def adaptive(self) -> None:
        """The controller against plain decoding."""
        bench = self.engines.get("auto")
        print("method auto over plain, by acceptance")
        print(f"{'rows':>6}{'plain/s':>10}{'auto/s':>10}{'ratio':>8}{'spread':>8}")
        rows_of_part = self.report["adaptive"] = []
        for rows in self.options.adaptive_batches:
            for acceptance in self.options.acceptances:
                sides = {
                    "plain": self.side(bench, rows, PLAIN),
                    "auto": self.side(bench, rows, Draft(forced_acceptance=acceptance)),
                }
                found = self.alternate(sides)
                tau = statistics.mean(window.tau for window in found["auto"])
                more = {"acceptance": acceptance, "tau": tau}
                self._ratio_row(rows_of_part, rows, found, "auto", more)

    def _ratio_row(
        self,
        table: list[dict[str, Any]],
        rows: int,
        found: dict[str, list[Window]],
        other: str,
        more: dict[str, float],
    ) -> None:
        row = _sides(found) | {"rows": rows} | more
        row["ratio"] = row[f"{other}_tokens_per_s"] / row["plain_tokens_per_s"]
        table.append(row)
        told = "".join(f"  {key} {value:.3f}" for key, value in more.items())
        print(
            f"{rows:>6}{row['plain_tokens_per_s']:10,.0f}{row[f'{other}_tokens_per_s']:10,.0f}"
            f"{row['ratio']:8.4f}{row['plain_spread']:8.4f}{told}{_captures(row)}",
            flush=True,
        )

    def tail(self) -> None:
        """Time to the last token of requests of lognormal lengths."""
        options, lens = self.options, _tail_lens(self.options)
        p = acceptance_for(options.tau, options.k)
        sides = {"plain": PLAIN, "drafts": Draft(forced_acceptance=p)}
        print(f"tail: {len(lens)} requests, {lens.sum():,} tokens, forced acceptance {p:.4f}")
        for method in options.tail_methods:
            bench = self.engines.get(method)
            found: dict[str, float] = {}
            for name, draft in sides.items():
                self._makespan(bench, draft, np.maximum(lens // 8, 4))
                graphs = bench.num_graphs
                found[f"{name}_s"] = self._makespan(bench, draft, lens)
                found[f"{name}_captures"] = bench.num_graphs - graphs
            found["ratio"] = found["drafts_s"] / found["plain_s"]
            self.report.setdefault("tail", {})[method] = found
            print(
                f"  {method}: {found['drafts_s']:.2f} s, plain {found['plain_s']:.2f} s, ratio "
                f"{found['ratio']:.3f} (captures {found['drafts_captures']:.0f} and "
                f"{found['plain_captures']:.0f})",
                flush=True,
            )

    def _makespan(self, bench: Bench, draft: Draft, lens: np.ndarray) -> float:
        bench.flush()
        requests = bench.requests(
            self.prompts[: len(lens)], draft, max_new_tokens=[int(length) for length in lens]
        )
        started = time.perf_counter()
        bench.run(requests)
        return time.perf_counter() - started


def _product_params(options: Options, num_parameters: int) -> int:
    return model_bytes(options.model, num_parameters).params


def _cpu_rate(size: int = 512) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    started = time.perf_counter()
    for _ in range(8):
        torch.mm(a, b)
    return 8 * 2 * size**3 / (time.perf_counter() - started)


def _median(windows: Sequence[Window]) -> Window:
    """The window of the middle rate."""
    return sorted(windows, key=lambda window: window.tokens_per_s)[len(windows) // 2]


def _sides(found: dict[str, list[Window]]) -> dict[str, Any]:
    """Rates of the sides, each side's spread over its median, and captures within windows."""
    row: dict[str, Any] = {"captures": 0}
    for name, windows in found.items():
        rates = [window.tokens_per_s for window in windows]
        row[f"{name}_tokens_per_s"] = statistics.median(rates)
        row[f"{name}_spread"] = (max(rates) - min(rates)) / statistics.median(rates)
        row[f"{name}_runs"] = rates
        row["captures"] += sum(window.captures for window in windows)
    return row


def _captures(row: dict[str, Any]) -> str:
    return f"  ({row['captures']} graphs captured within)" if row["captures"] else ""


def main() -> None:
    """Check, then measure part by part; what was found so far is written after each."""
    options = tyro.cli(Options, description=__doc__)
    run = Measurement(options)
    run.report["check"] = check(run.engines.get("ngram"), k=options.k, tau=options.tau)
    parts: dict[Part, Callable[[], None]] = {
        "forced": run.forced,
        "off": run.off,
        "adaptive": run.adaptive,
        "tail": run.tail,
    }
    for part in options.parts:
        started = time.perf_counter()
        parts[part]()
        print(f"  {part} took {time.perf_counter() - started:.0f} s", flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(run.report, indent=1) + "\n")
    run.engines.close()


if __name__ == "__main__":
    main()
