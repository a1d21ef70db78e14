"""The command line: `python -m rollout COMMAND`, also installed as `slipstream`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import tyro
from tyro.conf import OmitArgPrefixes

from engine.config import EngineConfig
from rollout.cli.failures import ALL_FAILED, SOME_FAILED, report
from rollout.cli.flag_ranges import check_engine, check_router, check_serve
from rollout.cli.keys import with_keys
from rollout.cli.progress_bar import ProgressDisplay
from rollout.cli.view import View, run_view
from rollout.files.jsonl import read_lines
from rollout.http.config import ServeConfig
from rollout.launch import launch
from rollout.logs.logging_setup import set_up_logging
from rollout.offline import FileReport, check_output, is_batch, run_file
from rollout.replica.spawned import ProcessReplica
from rollout.router.config import RouterConfig
from rollout.terminal_chat.chat_config import ChatConfig
from rollout.text.tokenizer import Tokenizer, find_tokenizer

logger = logging.getLogger("rollout")

ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "OutOfMemory": "lower --kv-memory, --max-running or --context-length",
        "DiskFull": "make room, and ask for the lines that are missing from the output",
    }
)


@dataclass(frozen=True, kw_only=True)
class Offline:
    """Answer a jsonl file without a server: native /generate objects, or OpenAI's batch lines."""

    engine: OmitArgPrefixes[EngineConfig]
    """What the engine is built from."""
    input: str
    """Input file: one /generate object a line, with text or input_ids; or one line of OpenAI's
    batch format, with custom_id, method, url and body."""
    output: str
    """Output file: one reply a line, in input order; a bad line gets an error object."""
    spawn: bool = False
    """Run the engine in a process of its own; batch lines always do."""
    served_model_name: str = ""
    """What the bodies of batch lines call the model; its path by default."""


Command = Offline | ServeConfig | RouterConfig | View | ChatConfig


def run_offline(args: Offline) -> FileReport:
    """`offline`: load the model, answer the file, say what was done."""
    check_engine(args.engine)
    check_output(args.input, args.output, field="--output")
    # All of it is read: what is no text is said before a model is loaded.
    batch = is_batch(list(read_lines(Path(args.input), field="--input")))
    tokenizer = find_tokenizer(args.engine.model)
    if batch:
        done = _run_batch(args, tokenizer)
    else:
        with (
            launch(args.engine, process=args.spawn) as replica,
            ProgressDisplay(replica) as display,
        ):
            seed = args.engine.seed
            done = run_file(
                replica, tokenizer, args.input, args.output, seed=seed, on_progress=display
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


def _run_batch(args: Offline, tokenizer: Tokenizer | None) -> FileReport:
    # Only the routes of a server need the HTTP stack.
    from rollout.http.openai.batch_file import run_batch

    served = ServeConfig(engine=args.engine, served_model_name=args.served_model_name)
    with launch(args.engine, process=True) as replica:
        assert isinstance(replica, ProcessReplica)
        seed = args.engine.seed
        return run_batch(replica, tokenizer, served, args.input, args.output, seed=seed)


def exit_code(done: FileReport, output: str) -> int:
    """0 if every line was answered, ALL_FAILED or SOME_FAILED otherwise, with a line on stderr."""
    if not done.num_errors:
        return 0
    sys.stderr.write(f"{done.num_errors} of {done.num_lines} lines failed; {output} says why\n")
    return ALL_FAILED if done.num_errors == done.num_lines else SOME_FAILED


def run_serve(config: ServeConfig) -> None:
    """`serve`: load the model and serve it until told to stop."""
    # Only a server needs the HTTP stack.
    from rollout.http.observing.traces import check_otel
    from rollout.http.server import serve

    check_serve(config)
    if config.otel:
        check_otel()
    serve(config)


def run_router(config: RouterConfig) -> None:
    """`router`: route until told to stop."""
    from rollout.router.server import route

    check_router(config)
    route(config)


def run_chat_here(config: ChatConfig) -> int:
    """`chat`: talk until told to leave; the exit code."""
    from rollout.terminal_chat.chat_loop import run_chat

    return run_chat(config)


def parse(argv: Sequence[str] | None = None) -> Command:
    """The command that the arguments name; exits with help or a usage error."""
    args: Command = tyro.extras.subcommand_cli_from_dict(
        {
            "offline": Offline,
            "serve": ServeConfig,
            "router": RouterConfig,
            "view": View,
            "chat": ChatConfig,
        },
        args=argv,
        prog="slipstream",
        description=__doc__,
    )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exits after one line on an error that is known (`failures.explain`); if the
    engine died, the end of its log comes with it. Exits too after a file with lines that failed."""
    args = parse(argv)
    if isinstance(args, ServeConfig | RouterConfig):
        access = isinstance(args, ServeConfig) and args.access_log
        set_up_logging(args.log_format, args.log_level, access=access)
    else:
        set_up_logging()
    try:
        if isinstance(args, ServeConfig):
            run_serve(with_keys(args, os.environ))
            return
        if isinstance(args, RouterConfig):
            run_router(with_keys(args, os.environ))
            return
        if isinstance(args, View):
            run_view(args)
            return
        if isinstance(args, ChatConfig):
            sys.exit(run_chat_here(args))
        code: int | None = exit_code(run_offline(args), args.output)
    except (Exception, KeyboardInterrupt) as error:
        code = report(error, advice=ADVICE)
        if code is None:
            raise
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
