"""Try a grammar before its request goes to the engine, where nobody could stop it.

It is compiled for the model's tokens, and its first mask computed, in a process whose processor
time and memory are bounded. What passed once, or was refused, is known from then on; what could
not be tried in time is not.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import msgspec

from engine.errors import InvalidRequest, SlipstreamError, by_name
from engine.protocol import ErrorInfo, GenerateRequest, Grammar
from rollout.jobs.job_process import JobProcess
from rollout.masks.grammar.languages.bounds import refuse
from rollout.masks.grammar.requested import grammar_field, in_field
from rollout.masks.grammar.vocabulary import vocabulary_of
from rollout.text.tokenizer import Tokenizer

_MEMORY_BYTES = 2 << 30
_MOST_KNOWN = 4096


class GrammarCheck:
    """At most one process, which the first grammar starts. From any thread.

    tokenizer: of the model; None where it has none. limit_s: processor time of one grammar.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        limit_s: float = 5.0,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> None:
        self._tokenizer = tokenizer
        self._limit_s = limit_s
        self._memory_bytes = memory_bytes
        # Callers that wait for the process, one after the other.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")
        self._lock = threading.Lock()
        self._process: JobProcess | None = None
        self._known: OrderedDict[bytes, ErrorInfo] = OrderedDict()

    async def checked(self, grammar: Grammar, vocab_size: int) -> None:
        """`check`, beside the event loop where it may take long."""
        known = self._known.get(_digest(grammar))
        if known is not None:
            _raise(known)
        else:
            call = self._pool.submit(self.check, grammar, vocab_size)
            await asyncio.wrap_future(call)

    def check(self, grammar: Grammar, vocab_size: int) -> None:
        """Raise InvalidRequest (`grammar`), naming the place, unless the model can be held to it.
        vocab_size: width of the model's logits. Blocks. Raises JobLate where that was not found
        out in time."""
        digest = _digest(grammar)
        with self._lock:
            info = self._known.get(digest)
            if info is None:
                info = self._tried(grammar, vocab_size)
                self._known[digest] = info
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
        _raise(info)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _tried(self, grammar: Grammar, vocab_size: int) -> ErrorInfo:
        if self._tokenizer is None:
            refuse("this model came without a tokenizer, so no text can be asked of it")
        if self._process is None:
            vocabulary = vocabulary_of(self._tokenizer, vocab_size)
            self._process = JobProcess(
                "rollout.masks.grammar.check_main",
                limit_s=self._limit_s,
                memory_bytes=self._memory_bytes,
                greeting=msgspec.msgpack.encode(vocabulary),
            )
        data = self._process.run(msgspec.msgpack.encode(grammar))
        if data is not None:
            return msgspec.msgpack.decode(data, type=ErrorInfo)
        return ErrorInfo(
            kind=InvalidRequest.__name__,
            message=f"grammar: it took longer than {self._limit_s:g} s to compile, more than "
            f"{self._memory_bytes >> 20} MiB, or too many rules deep; ask for less",
            field="grammar",
        )


def check_grammar(
    known: GrammarCheck, wire: GenerateRequest, grammar: Grammar, vocab_size: int
) -> None:
    """`GrammarCheck.check` of the grammar of a native request, whose field errors name."""
    try:
        known.check(grammar, vocab_size)
    except InvalidRequest as error:
        raise in_field(error, grammar_field(wire)) from error


def _digest(grammar: Grammar) -> bytes:
    return hashlib.sha256(f"{grammar.kind}\n{grammar.source}".encode()).digest()


def _raise(info: ErrorInfo) -> None:
    if info.kind:
        error: SlipstreamError = by_name(info.kind, info.message, info.field)
        raise error
