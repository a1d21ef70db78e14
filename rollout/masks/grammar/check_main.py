"""The process that tries grammars; started by `check.GrammarCheck` alone."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from engine.errors import InvalidRequest, SlipstreamError
from engine.protocol import ErrorInfo, Grammar
from rollout.jobs.job_loop import Answer, serve_jobs
from rollout.masks.grammar.compile import compile_grammar, told
from rollout.masks.grammar.languages.bounds import refuse
from rollout.masks.grammar.panics import Panic, contained
from rollout.masks.grammar.stack import TRIALS_STACK_BYTES, stack_of
from rollout.masks.grammar.vocabulary import Vocabulary, llguidance_tokenizer
from rollout.replica.command_replies import error_info


def start(greeting: bytes) -> Answer:
    """What answers a job, for the `Vocabulary` of the greeting: a `Grammar`, to an `ErrorInfo`, of
    no kind where the grammar is good. All as MessagePack."""
    vocabulary = msgspec.msgpack.decode(greeting, type=Vocabulary)
    tokenizer, special = llguidance_tokenizer(vocabulary), vocabulary.special_tokens()

    def tried(data: bytes) -> bytes:
        try:
            matcher = compile_grammar(
                msgspec.msgpack.decode(data, type=Grammar), tokenizer, special
            ).deep_copy()
            bits = allocate_token_bitmask(1, vocabulary.end_id + 1)
            contained(fill_next_token_bitmask, matcher, bits)
            if matcher.is_error():
                refuse(told(matcher))
            if not np.any(bits):
                refuse("no text fits it")
        except SlipstreamError as error:
            info = error_info(error)
        except Panic as error:
            info = ErrorInfo(
                kind=InvalidRequest.__name__,
                message=f"grammar: it cannot be served: {error}",
                field="grammar",
            )
        else:
            info = ErrorInfo(kind="", message="")
        return msgspec.msgpack.encode(info)

    with stack_of(TRIALS_STACK_BYTES):
        pool = ThreadPoolExecutor(1)
        # It starts the thread.
        pool.submit(int).result()
    return lambda data: pool.submit(tried, data).result()


if __name__ == "__main__":
    serve_jobs(start, sys.argv[1:])
