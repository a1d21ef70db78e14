"""Compiled grammars of one model, each made once, beside the thread that asks for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer

from engine.protocol import Grammar
from rollout.masks.grammar.compile import compile_grammar
from rollout.masks.grammar.vocabulary import Vocabulary, llguidance_tokenizer

_NUM_THREADS = 2
_MOST_KEPT = 256
_MOST_PENDING = 64
"""Grammars that are begun ahead; fewer than are kept, so that none is dropped before its use."""


@dataclass(frozen=True)
class _Compiler:
    tokenizer: LLTokenizer
    special: dict[str, int]


class CompiledGrammars:
    """By kind and source. Called by one thread."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        """load: the model's tokens; called once, in a thread, when the first grammar is asked
        for."""
        self._load = load
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._found: OrderedDict[tuple[str, str], Future[LLMatcher]] = OrderedDict()
        self._compiler: _Compiler | None = None
        self._loading = threading.Lock()

    def get(self, grammar: Grammar) -> Future[LLMatcher]:
        """The matcher at the beginning of a grammar, once it is there; it is begun now if it was
        not. Not to be moved. Its error is that of `compile_grammar`."""
        key = grammar.kind, grammar.source
        future = self._found.get(key)
        if future is None:
            future = self._found[key] = self._pool.submit(self._compile, grammar)
            self._drop_old()
        else:
            self._found.move_to_end(key)
        return future

    def prepare(self, grammar: Grammar) -> bool:
        """Whether `get` is done; begins it unless too many are under way."""
        if (grammar.kind, grammar.source) not in self._found:
            pending = sum(not future.done() for future in self._found.values())
            if pending >= _MOST_PENDING:
                return False
        return self.get(grammar).done()

    def close(self) -> None:
        """Begin nothing more. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        with self._loading:
            if self._compiler is None:
                vocabulary = self._load()
                self._compiler = _Compiler(
                    llguidance_tokenizer(vocabulary), vocabulary.special_tokens()
                )
        return compile_grammar(grammar, self._compiler.tokenizer, self._compiler.special)

    def _drop_old(self) -> None:
        surplus = len(self._found) - _MOST_KEPT
        if surplus <= 0:
            return
        # The oldest that is done; one that is not is awaited.
        old = [key for key, future in self._found.items() if future.done()][:surplus]
        for key in old:
            del self._found[key]
