"""What a schema costs: tokens a second of rows that are held to one, over those of free rows.

    python benchmarks/structured.py --rows 32

On a GPU: `--device cuda --rows 256 --model benchmarks/shapes/qwen2.5-1.5b.json`.

All rows are held to one JSON Schema of 20 properties (`SCHEMA`), and every output is checked by a
validator. The free rows of the same prompts have as many output tokens each as the row that is held
to the schema had, so that both sides run steps of the same rows. The two alternate; the ratio is
that of the medians. Beside it: how long the first mask of a schema of 100 properties takes, its
compilation included, once the model's tokens are loaded.

A model that is a config.json gets random weights, and a tokenizer of as many tokens, drawn from
syllables, digits and what JSON is written with.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import jsonschema_rs
import numpy as np
import tokenizers
import torch
import tyro
from machine import describe
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.protocol import FlushCache, Grammar, Request, RequestOutput, SamplingParams
from rollout.launch import launch
from rollout.masks.base import MaskedRow
from rollout.masks.grammar.source import GrammarMasks
from rollout.masks.grammar.vocabulary import load_vocabulary
from rollout.offline import generate, load_tokenizer
from rollout.replica.base import Replica

DEFAULT_MODEL = ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
_TEXT = {"type": "string", "minLength": 10, "maxLength": 60}
_KINDS: tuple[dict[str, Any], ...] = (
    _TEXT,
    {"type": "integer", "minimum": 0, "maximum": 100_000},
    {"enum": ["low", "middle", "high"]},
    {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 2},
    {"type": "boolean"},
)


def schema_of(num_properties: int) -> dict[str, Any]:
    """An object of so many properties, all required, of five kinds in turn."""
    properties = {f"property_{n}": _KINDS[n % len(_KINDS)] for n in range(num_properties)}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMA = schema_of(20)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = DEFAULT_MODEL
    """Model to run; of a config.json, its shape with random weights."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "auto"
    """As the engine's."""
    rows: int = 32
    """Rows of a step, all held to the schema or none."""
    prompt_tokens: int = 64
    """Tokens of a prompt."""
    output_tokens: int = 2048
    """Most tokens of an output; one that is cut is not valid."""
    repeats: int = 3
    """Measured runs of each side."""
    json: str | None = None
    """Write the figures to this file."""


def synthetic_model(config_path: Path, folder: Path) -> str:
    """A folder with that config.json and a tokenizer of its vocabulary's size."""
    shutil.copy(config_path, folder / "config.json")
    size = json.loads(config_path.read_text())["vocab_size"]
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er")]
    marks = ['{"', '":', '",', '"}', "},", '": "', '", "', "_", "property", "},{", "[]", '":["']
    vocab = {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for mark in marks:
        vocab.setdefault(mark.replace(" ", "Ġ"), len(vocab))
    while len(vocab) < size - 1:
        word = "".join(rng.choices(syllables, k=rng.randint(1, 4)))
        word = rng.choice(["", "", "Ġ"]) + rng.choice(
            [word, word.capitalize(), str(rng.randint(0, 999))]
        )
        vocab.setdefault(word, len(vocab))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return str(folder)


def engine(options: Options, model: str, *, random_weights: bool) -> Replica:
    """The engine of both sides."""
    tokens = options.prompt_tokens + options.output_tokens
    return launch(
        EngineConfig(
            model=model,
            load_format="random" if random_weights else "auto",
            device=options.device,
            dtype=options.dtype,
            context_length=tokens,
            cache=CacheConfig(num_pages=options.rows * (-(-tokens // 16) + 1)),
            scheduler=SchedulerConfig(max_running=options.rows),
        )
    )


def requests(
    options: Options, eos_ids: list[int], vocab_size: int, *, sizes: list[int] | None, seed: int
) -> list[Request]:
    """One a row: held to the schema, or with `sizes` free and of that many tokens each."""
    draw = np.random.default_rng(7)
    grammar = Grammar(kind="json_schema", source=json.dumps(SCHEMA))
    return [
        Request(
            rid=f"{row}",
            prompt_ids=draw.integers(3, vocab_size - 3, options.prompt_tokens, np.int32),
            sampling=SamplingParams(
                max_new_tokens=options.output_tokens if sizes is None else sizes[row],
                ignore_eos=sizes is not None,
            ),
            seed=seed * options.rows + row,
            stop_ids=eos_ids if sizes is None else [],
            grammar=grammar if sizes is None else None,
        )
        for row in range(options.rows)
    ]


def num_valid(outputs: list[RequestOutput], tokenizer: Any) -> int:
    """Outputs that fit the schema."""
    validator = jsonschema_rs.validator_for(SCHEMA)
    found = 0
    for output in outputs:
        try:
            found += validator.is_valid(json.loads(tokenizer.decode(output.token_ids)))
        except ValueError:
            continue
    return found


def first_mask_ms(model: str, vocab_size: int, eos_ids: list[int], repeats: int) -> list[float]:
    """Milliseconds from a schema of 100 properties to its first mask; the schemas differ, so that
    each is compiled."""
    source = GrammarMasks(
        lambda: load_vocabulary(model, vocab_size), vocab_size=vocab_size, eos_ids=eos_ids
    )
    times = []
    for repeat in range(repeats + 1):
        schema = {**schema_of(100), "title": str(repeat)}
        request = Request(
            rid=str(repeat),
            prompt_ids=np.array([1], np.int32),
            sampling=SamplingParams(),
            seed=0,
            stop_ids=eos_ids,
            grammar=Grammar(kind="json_schema", source=json.dumps(schema)),
        )
        row = MaskedRow(row=0, slot=0, request=request, output_ids=np.empty(0, np.int32))
        started = time.perf_counter()
        (mask,) = source.ask([row])
        while not mask.done():
            time.sleep(0.0001)
        mask.result()
        if repeat > 0:  # the first loads the model's tokens
            times.append(1000 * (time.perf_counter() - started))
    source.close()
    return times


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Alternate both sides."""
    synthetic = options.model.endswith(".json")
    model = synthetic_model(Path(options.model), folder) if synthetic else options.model
    tokenizer = load_tokenizer(model)
    eos_ids = list(tokenizer.eos_ids)
    seconds: dict[str, list[float]] = {"held": [], "free": []}
    tokens, valid, total = [], 0, 0
    with engine(options, model, random_weights=synthetic) as replica:
        size = replica.state().vocab_size
        masks = first_mask_ms(model, size, eos_ids, max(3, options.repeats))

        def timed(sizes: list[int] | None, seed: int) -> tuple[float, list[RequestOutput]]:
            replica.send(FlushCache())
            batch = requests(options, eos_ids, size, sizes=sizes, seed=seed)
            started = time.perf_counter()
            outputs = generate(replica, batch)
            return time.perf_counter() - started, outputs

        for repeat in range(options.repeats + 1):
            held_s, outputs = timed(None, repeat)
            lengths = [len(output.token_ids) for output in outputs]
            free_s, free = timed(lengths, repeat)
            assert [len(output.token_ids) for output in free] == lengths
            said = f"{sum(lengths)} tokens: held {held_s:.2f} s, free {free_s:.2f} s"
            print(said, file=sys.stderr, flush=True)
            valid += num_valid(outputs, tokenizer)
            total += len(outputs)
            if repeat > 0:  # the first run of each warms up
                seconds["held"].append(held_s / sum(lengths))
                seconds["free"].append(free_s / sum(lengths))
                tokens.append(sum(lengths))
    rates = {side: 1 / statistics.median(times) for side, times in seconds.items()}
    return {
        "options": {**asdict(options), "model": Path(options.model).name, "json": None},
        "machine": describe(),
        "torch": torch.__version__,
        "vocabulary": size,
        "output_tokens": tokens,
        "tokens_per_s": rates,
        "ratio": rates["held"] / rates["free"],
        "valid": f"{valid} of {total}",
        "first_mask_ms": masks,
    }


def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    print(json.dumps(found, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
