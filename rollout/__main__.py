"""The command line: `python -m rollout COMMAND`, also installed as `slipstream`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import tyro

from engine.config import (
    AttentionBackendName,
    CacheConfig,
    Device,
    DType,
    EngineConfig,
    LoadFormat,
    SchedulerConfig,
)
from rollout.cli.failures import ALL_FAILED, SOME_FAILED, report
from rollout.cli.flag_ranges import check_numbers
from rollout.cli.progress_bar import ProgressDisplay
from rollout.cli.serve_flags import Serve, serve_config
from rollout.files.jsonl import read_lines
from rollout.launch import launch
from rollout.offline import FileReport, check_output, is_batch, run_file
from rollout.replica.spawned import ProcessReplica
from rollout.text.tokenizer import Tokenizer, find_tokenizer

logger = logging.getLogger("rollout")

_GIB = 1 << 30

ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "OutOfMemory": "lower --kv-memory, --max-running or --context-length",
        "DiskFull": "make room, and ask for the lines that are missing from the output",
    }
)


@dataclass(frozen=True, kw_only=True)
class Offline:
    """Answer a jsonl file without a server: native /generate objects, or OpenAI's batch lines."""

    model: str
    """Hugging Face folder, GGUF file, or a config.json (with --load-format random)."""
    input: str
    """Input file: one /generate object a line, with text or input_ids; or one line of OpenAI's
    batch format, with custom_id, method, url and body."""
    output: str
    """Output file: one reply a line, in input order; a bad line gets an error object."""
    load_format: LoadFormat = "auto"
    """Where the weights come from; 'random' needs only a config.json."""
    device: Device = "auto"
    """'auto' takes a GPU when there is one."""
    dtype: DType = "auto"
    """Weights and KV; 'auto' is bfloat16 where the device computes it fast, else float32."""
    context_length: int | None = None
    """Most tokens of a sequence; by default the model's own, at most 32768."""
    attention: AttentionBackendName = "auto"
    """Attention back end."""
    max_running: int = 256
    """Most sequences running at once."""
    kv_memory: float | None = None
    """GiB for the KV cache; by default a share of the free memory."""
    page_size: int = 16
    """Tokens a KV page holds."""
    prefix_cache: bool = True
    """Reuse the KV of shared prefixes."""
    seed: int | None = None
    """Seed of requests that bring none, and of random weights; drawn and logged by default."""
    spawn: bool = False
    """Run the engine in a process of its own; batch lines always do."""
    served_model_name: str = ""
    """What the bodies of batch lines call the model; its path by default."""


def engine_config(args: Offline) -> EngineConfig:
    """The replica's configuration that the options describe.

    Raises InvalidRequest naming an option whose value has no meaning.
    """
    check_numbers(args)
    memory_bytes = None if args.kv_memory is None else int(args.kv_memory * _GIB)
    return EngineConfig(
        model=args.model,
        load_format=args.load_format,
        device=args.device,
        dtype=args.dtype,
        context_length=args.context_length,
        attention=args.attention,
        seed=args.seed,
        cache=CacheConfig(
            page_size=args.page_size, memory_bytes=memory_bytes, prefix_cache=args.prefix_cache
        ),
        scheduler=SchedulerConfig(max_running=args.max_running),
    )


def run_offline(args: Offline) -> FileReport:
    """`offline`: load the model, answer the file, say what was done."""
    config = engine_config(args)
    check_output(args.input, args.output, field="--output")
    # What is no text is said before a model is loaded.
    lines = list(read_lines(Path(args.input), field="--input"))
    tokenizer = find_tokenizer(args.model)
    if is_batch(lines):
        done = _run_batch(args, config, tokenizer)
    else:
        with (
            launch(config, process=args.spawn) as replica,
            ProgressDisplay(replica) as display,
        ):
            done = run_file(
                replica, tokenizer, args.input, args.output, seed=args.seed, on_progress=display
            )
    logger.info(
        "%d lines (%d errors), %d prompt tokens, %d output tokens -> %s",
        done.num_lines,
        done.num_errors,
        done.num_prompt_tokens,
        done.num_output_tokens,
        args.output,
    )
    return done


def _run_batch(args: Offline, config: EngineConfig, tokenizer: Tokenizer | None) -> FileReport:
    # Only the routes of a server need the HTTP stack.
    from rollout.http.config import ServeConfig
    from rollout.http.openai.batch_file import run_batch

    served = ServeConfig(engine=config, served_model_name=args.served_model_name)
    with launch(config, process=True) as replica:
        assert isinstance(replica, ProcessReplica)
        return run_batch(replica, tokenizer, served, args.input, args.output, seed=args.seed)


def exit_code(done: FileReport, output: str) -> int:
    """0 if every line was answered, ALL_FAILED or SOME_FAILED otherwise, with a line on stderr."""
    if not done.num_errors:
        return 0
    sys.stderr.write(f"{done.num_errors} of {done.num_lines} lines failed; {output} says why\n")
    return ALL_FAILED if done.num_errors == done.num_lines else SOME_FAILED


def run_serve(args: Serve) -> None:
    """`serve`: load the model and serve it until told to stop."""
    # Only a server needs the HTTP stack.
    from rollout.http.server import serve

    serve(serve_config(args))


def parse(argv: Sequence[str] | None = None) -> Offline | Serve:
    """The command that the arguments name; exits with help or a usage error."""
    args: Offline | Serve = tyro.extras.subcommand_cli_from_dict(
        {"offline": Offline, "serve": Serve}, args=argv, prog="slipstream", description=__doc__
    )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exits after one line on an error that is known (`failures.explain`); if the
    engine died, the end of its log comes with it. Exits too after a file with lines that failed."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if isinstance(args, Serve):
            run_serve(args)
            return
        code: int | None = exit_code(run_offline(args), args.output)
    except (Exception, KeyboardInterrupt) as error:
        code = report(error, advice=ADVICE)
        if code is None:
            raise
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
