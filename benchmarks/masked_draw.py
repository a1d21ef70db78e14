"""Time draws of rows with masks on a GPU: `python benchmarks/masked_draw.py [--json FILE]`.

256 rows of 151,936 logits, each with a mask, as a step of structured output has them. `one pass`
is what the engine does with rows that have no filter; `two draws` draws all rows as ever, and
those with a mask once more from a copy of their logits, which is what rows with a filter still
take; both send all masks. `known masks` is one pass with masks that the GPU has, as in most steps;
`no masks` is the same rows without them. First the two ways are compared: tokens, logprobs,
and that rows beside masked ones keep every bit. Then for each way and dtype:

device us: of one draw, from the copy of the bits to the last kernel, with all of it queued behind
    other work, so that no launch is waited for; the median.
host us: what one call keeps the host for, with nothing queued before it; the median.

Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
from machine import describe
from msgspec.structs import replace

from engine.batch import RequestTable
from engine.protocol import NewRow, RowSampling, StepMasks
from engine.sampling import Sampler

ROWS, VOCAB, REPEATS = 256, 151_936, 30
KNOWN = 3
BUSY_CYCLES = 20_000_000
"""Some 10 ms: longer than the host takes to queue a draw."""
DTYPES = (torch.float32, torch.bfloat16)
WAYS = ("no masks", "two draws", "one pass", "known masks")


@dataclass(frozen=True)
class _Batch:
    slots_S: torch.Tensor
    kv_lens_S: torch.Tensor


class Step:
    """A step of rows at temperatures 0, 0.7 and 1, in slots 0, 1, ..."""

    def __init__(self, dtype: torch.dtype, masked: np.ndarray) -> None:
        device = torch.device("cuda")
        self.slots = np.arange(ROWS)
        self._sampler = Sampler(num_slots=ROWS, device=device, backend="triton")
        self._table = RequestTable(num_slots=ROWS, context_length=16, page_size=4, device=device)
        known = np.arange(KNOWN, dtype=np.int32)
        self._sampler.enter(
            [
                NewRow(slot=row, token_ids=known, prompt_len=KNOWN, sampling=_sampling(row))
                for row in range(ROWS)
            ]
        )
        generator = torch.Generator("cuda").manual_seed(1)
        logits = 3 * torch.randn(ROWS, VOCAB, device=device, generator=generator)
        self._logits = logits.to(dtype)
        self._batch = _Batch(
            torch.arange(ROWS, device=device), torch.full((ROWS,), KNOWN, device=device)
        )
        bits = np.random.default_rng(2).integers(
            0, 1 << 32, (len(masked), VOCAB // 32), dtype=np.uint32
        )
        # As in a frame that came, nothing may be written.
        bits.setflags(write=False)
        places = np.arange(len(masked), dtype=np.int32)
        rows = masked.astype(np.int32)
        self._sent = StepMasks(step=0, rows=rows, places=places, new=places, bits=bits)
        nothing = places[:0]
        self._known = replace(self._sent, new=nothing, bits=bits[:0])

    def draw(self, way: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and logprobs."""
        sent = self._known if way == "known masks" else self._sent
        masks = None if way == "no masks" else self._sampler.masks.enter(sent)
        if way == "two draws":
            rows = self._logits, self._batch
            drawn = self._sampler.draw_plain(self._logits, *vars(self._batch).values())
            self._sampler._draw_masked(*rows, self.slots, masks, *drawn)
            return drawn
        found = self._sampler.draw(self._logits, self._batch, self.slots, self._table, masks)
        return found.token_S, found.logprob_S


def _sampling(row: int) -> RowSampling:
    return RowSampling(
        temperature=(0.0, 0.7, 1.0)[row % 3],
        top_k=-1,
        top_p=1.0,
        min_p=0.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        logit_bias={},
        seed=row,
        min_new_tokens=0,
        banned_ids=[],
        top_logprobs=0,
    )


def compare(dtype: torch.dtype) -> str:
    """Raise AssertionError if the ways differ in more than rounding; what was found."""
    masked = np.flatnonzero(np.arange(ROWS) % 4)
    step = Step(dtype, masked)
    plain, two, one, known = (step.draw(way) for way in WAYS)
    assert all(torch.equal(*pair) for pair in zip(one, known, strict=True)), "kept masks differ"
    free = torch.from_numpy(np.setdiff1d(step.slots, masked)).cuda()
    for name, got, want in zip(("token", "logprob"), one, plain, strict=True):
        assert torch.equal(got[free], want[free]), f"{name}s of rows without a mask differ"
    same = one[0] == two[0]
    assert int(same.sum()) >= ROWS - 2, f"only {int(same.sum())} of {ROWS} tokens are equal"
    off = (one[1] - two[1])[same].abs().max()
    assert float(off) < 2e-5, f"a logprob differs by {float(off):.2e}"
    equal = int((one[1] == two[1]).sum())
    return (
        f"{int(same.sum())} of {ROWS} tokens are equal, logprobs within {float(off):.1e}, "
        f"{equal} of them to the bit; {len(free)} rows without a mask equal to the bit"
    )


def device_us(call: Callable[[], Any]) -> float:
    """See the head of this file."""
    found = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end))
    return statistics.median(found)


def host_us(call: Callable[[], Any]) -> float:
    """See the head of this file."""
    found = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - started))
    return statistics.median(found)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def measure(dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row of the table for each way."""
    step, rows = Step(dtype, np.arange(ROWS)), []
    for way in WAYS:
        for _ in range(3):
            step.draw(way)
        found = {
            "dtype": str(dtype).removeprefix("torch."),
            "way": way,
            "device_us": device_us(lambda way=way: step.draw(way)),
            "host_us": host_us(lambda way=way: step.draw(way)),
        }
        _say(f"{found['dtype']:<10}{way:<12}{found['device_us']:>11.1f}{found['host_us']:>9.1f}")
        rows.append(found)
    return rows


def main() -> int:
    """Compare, then measure; 1 if the ways differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed; torch sees none")
    machine = {"machine": describe(), "torch": torch.__version__}
    _say(f"{machine['machine']}, torch {machine['torch']}, {ROWS} rows of {VOCAB} logits")
    failures, rows = 0, []
    for dtype in DTYPES:
        try:
            _say(f"{dtype}: {compare(dtype)}")
        except AssertionError as error:
            failures += 1
            _say(f"FAIL {dtype}: {error}")
    _say(f"{'dtype':<10}{'way':<12}{'device us':>11}{'host us':>9}")
    for dtype in DTYPES:
        rows += measure(dtype)
    if args.json:
        args.json.write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
