"""Batches without a server: lists of requests, and files of native `/generate` objects.

What others use is here by name: `generate`, `classify`, `classify_request`, `embed`,
`embed_request`, `join_outputs`, `load_tokenizer`, `normalised_messages`, `check_variables`,
`expand`, `respond`, the reader of lines (`files/jsonl.py`), the care for full disks
(`files/disk_space.py`) and what is said of errors (`cli/failures.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path

import msgspec

from engine.errors import InvalidRequest, SlipstreamError, UnsupportedOption
from engine.protocol import ErrorInfo, GenerateRequest, ReplicaState, Request, RequestOutput
from rollout.cli.failures import report
from rollout.files.disk_space import (
    append_bytes,
    free_bytes,
    replace_file,
    require_room,
    sync,
    write_all,
    writing,
)
from rollout.files.jsonl import (
    JsonLine,
    check_line,
    decode_text,
    open_text,
    parse_line,
    read_lines,
)
from rollout.masks.grammar.check import GrammarCheck, check_grammar
from rollout.replica.base import Replica
from rollout.replica.command_replies import error_info
from rollout.requests.expand import expand, with_seed
from rollout.requests.generate import (
    OnProgress,
    Progress,
    classify,
    classify_request,
    embed,
    embed_request,
    generate,
    run,
)
from rollout.requests.outputs import join_outputs
from rollout.requests.respond import respond, to_wire
from rollout.requests.seeds import base_seed, derive_seed
from rollout.requests.wire import parse_request
from rollout.text.chat_template import check_variables
from rollout.text.messages import normalised_messages
from rollout.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "JsonLine",
    "OnProgress",
    "Progress",
    "Tokenizer",
    "append_bytes",
    "check_line",
    "check_output",
    "check_variables",
    "classify",
    "classify_request",
    "create_output",
    "decode_text",
    "derive_seed",
    "embed",
    "embed_request",
    "expand",
    "free_bytes",
    "generate",
    "is_batch",
    "join_outputs",
    "load_tokenizer",
    "normalised_messages",
    "open_text",
    "parse_line",
    "read_lines",
    "replace_file",
    "report",
    "require_room",
    "respond",
    "run",
    "run_file",
    "sync",
    "writing",
]

_REFUSED = {"InvalidRequest", "ContextTooLong", "UnsupportedOption", "QueueFull", "NoVersion"}


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What `run_file` did. num_errors: lines whose output line is an error, or has a sample that
    ended by one."""

    num_lines: int
    num_errors: int
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(kw_only=True)
class _Line:
    where: str
    wire: GenerateRequest | None = None
    error: ErrorInfo | None = None
    requests: list[Request] = field(default_factory=list)
    outputs: dict[str, RequestOutput] = field(default_factory=dict)

    def done(self) -> bool:
        if self.error is not None:
            return True
        return bool(self.requests) and len(self.outputs) == len(self.requests)

    def num_sequences(self) -> int:
        return 0 if self.wire is None else max(self.wire.sampling_params.n, 0)


def run_file(
    replica: Replica,
    tokenizer: Tokenizer | None,
    input_path: str | Path,
    output_path: str | Path,
    *,
    seed: int | None = None,
    on_progress: OnProgress | None = None,
) -> FileReport:
    """Answer every line of a jsonl file of native `/generate` objects, in input order.

    A line asking for n > 1 samples gets a list of replies with `index` set. A line that
    cannot be served gets `{"error": {"kind", "message", "field"}}`, and the others go on. A
    sample that the engine ended by an error has it in its `finish_reason`, with the tokens it
    had, and its line counts as an error.
    Output lines are written as soon as every line before them is. Lines without a
    `sampling_seed` get seeds derived from `seed` and the line number; None draws and logs one.

    Raises InvalidRequest naming `input` or `output` if that file cannot be opened or is no text,
    EngineDead if the replica dies, and DiskFull if the replies do not fit; what was finished is on
    disk then, in whole lines.
    """
    check_output(input_path, output_path)
    lines = [_parse(line) for line in read_lines(Path(input_path), field="input")]
    job = _FileJob(lines, tokenizer, replica.state(), base_seed(seed))

    def show(progress: Progress) -> None:
        if on_progress is not None:
            on_progress(replace(progress, num_requests=job.num_sequences))

    with create_output(Path(output_path)) as out:
        job.write_ready(out)
        outputs = run(replica, job.requests(), total=0, tokenizer=tokenizer, on_progress=show)
        with closing(outputs):
            for output in outputs:
                job.take(output)
                job.write_ready(out)
        job.write_ready(out)
    return job.report()


def is_batch(lines: Iterable[JsonLine]) -> bool:
    """Whether the first line that can be read is one of OpenAI's batch format
    (`rollout/http/openai/batch_file.py` answers those)."""
    for line in lines:
        try:
            found = check_line(line)
        except InvalidRequest:
            continue
        return "custom_id" in found or "url" in found
    return False


def check_output(input_path: str | Path, output_path: str | Path, *, field: str = "output") -> None:
    """Look whether the replies can be written there, before a model is loaded for them; nothing
    is made or changed. Raises InvalidRequest for the input itself, which would be lost, for a
    folder, and for a place that is not there or may not be written."""
    source, path = Path(input_path), Path(output_path)
    if path.exists() and source.exists() and path.samefile(source):
        raise InvalidRequest(
            f"{field}: {path} is the input, which would be lost; name another file", field=field
        )
    told = None
    if path.is_dir():
        told = "it is a folder; name a file"
    elif not path.parent.is_dir():
        told = f"there is no folder {path.parent}; make it first"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        told = "it may not be written; check who may, or name another file"
    if told is not None:
        raise InvalidRequest(f"{field}: cannot write {path}: {told}", field=field)


def create_output(path: Path) -> FileIO:
    """The file of replies, empty. Raises InvalidRequest (`output`)."""
    try:
        # Unbuffered: what does not fit is known at once, and can be taken back.
        return FileIO(path, "w")
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}", field="output") from error


def _parse(line: JsonLine) -> _Line:
    try:
        check_line(line)
        wire = parse_request(line.data)
        if wire.timeout_s is not None:
            raise UnsupportedOption(
                "timeout_s is a server's; a file is answered to its end: leave it out",
                field="timeout_s",
            )
        return _Line(where=line.where, wire=wire)
    except SlipstreamError as error:
        return _Line(where=line.where, error=error_info(error))


def _placed(line: _Line) -> ErrorInfo | None:
    """The error with the place of its line, which blank lines make another in the output."""
    error = line.error
    if error is None:
        return None
    return msgspec.structs.replace(error, message=f"{line.where}: {error.message}")


class _FileJob:
    """The lines of one file on their way through the replica.

    num_sequences: those that the lines ask for, less the lines found to be bad so far.
    """

    def __init__(
        self,
        lines: list[_Line],
        tokenizer: Tokenizer | None,
        state: ReplicaState,
        seed: int,
    ) -> None:
        self._lines = lines
        self._tokenizer = tokenizer
        self._state = state
        self._seed = seed
        self._grammars = GrammarCheck(tokenizer)
        self._line_of: dict[str, _Line] = {}
        self.num_sequences = sum(line.num_sequences() for line in lines)
        self._num_written = 0
        self._num_errors = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    def requests(self) -> Iterator[Request]:
        """Requests of the good lines; a bad one keeps its error for the output."""
        for number, line in enumerate(self._lines):
            if line.wire is None:
                continue
            try:
                line.requests = self._expand(number, line.wire)
            except SlipstreamError as error:
                line.error = error_info(error)
                self.num_sequences -= line.num_sequences()
            yield from line.requests

    def take(self, output: RequestOutput) -> None:
        """Keep a finished sequence with its line."""
        line = self._line_of[output.rid]
        line.outputs[output.rid] = output
        finish = output.finish
        if finish is not None and finish.error in _REFUSED:
            line.error = ErrorInfo(kind=finish.error or "", message=finish.message or "")

    def write_ready(self, out: FileIO) -> None:
        """Write every line that is done and has no unfinished line before it. Raises DiskFull."""
        written = []
        while self._num_written < len(self._lines) and self._lines[self._num_written].done():
            line = self._lines[self._num_written]
            written.append(msgspec.json.encode(self._answer(line)) + b"\n")
            self._num_written += 1
            line.wire, line.requests, line.outputs = None, [], {}
        if written:
            write_all(out, b"".join(written))

    def report(self) -> FileReport:
        """Totals, once every line is written."""
        assert self._num_written == len(self._lines), "a line was left without an answer"
        return FileReport(
            num_lines=len(self._lines),
            num_errors=self._num_errors,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def _expand(self, number: int, wire: GenerateRequest) -> list[Request]:
        line = self._lines[number]
        seed = derive_seed(self._seed, number)
        requests = expand(wire, self._tokenizer, self._state, seed)
        if requests[0].grammar is not None:
            check_grammar(self._grammars, wire, requests[0].grammar, self._state.vocab_size)
        line.wire = with_seed(wire, seed)
        for request in requests:
            if request.rid in self._line_of:
                raise InvalidRequest(f"rid {request.rid!r} was used by another line", field="rid")
        self._line_of.update((request.rid, line) for request in requests)
        return requests

    def _answer(self, line: _Line) -> object:
        if line.error is not None or line.wire is None:
            self._num_errors += 1
            return {"error": _placed(line)}
        many = line.wire.sampling_params.n > 1
        replies, failed = [], False
        for index, request in enumerate(line.requests):
            output = line.outputs[request.rid]
            self._num_prompt_tokens += len(request.prompt_ids)
            self._num_output_tokens += len(output.token_ids)
            failed |= output.finish is not None and output.finish.error is not None
            response = respond(
                line.wire, request, output, self._tokenizer, index=index if many else None
            )
            replies.append(to_wire(response))
        self._num_errors += failed
        return replies if many else replies[0]
