"""Compiled grammars of one model, each made once, beside the thread that asks for it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from llguidance import LLMatcher, LLTokenizer

from engine.errors import MaskError, SlipstreamError, by_name
from engine.protocol import ErrorInfo, Grammar
from rollout.masks.grammar.compile import compile_grammar
from rollout.masks.grammar.languages.translate import schema_of
from rollout.masks.grammar.stack import LEADERS_STACK_BYTES, stack_of
from rollout.masks.grammar.starts import Start
from rollout.masks.grammar.vocabulary import Vocabulary, llguidance_tokenizer
from rollout.masks.states.json_text import JsonText
from rollout.masks.states.outputs_alike import OutputsAlike
from rollout.masks.states.states import States
from rollout.masks.states.token_lengths import TokenLengths, token_lengths
from rollout.replica.command_replies import error_info

logger = logging.getLogger(__name__)

_NUM_THREADS = 2
_MOST_KEPT = 256
_MOST_ENDS = 4
"""Sets of tokens that end outputs of one grammar, of which states are kept."""
_MOST_PENDING = 64
"""Grammars that are begun ahead; fewer than are kept, so that none is dropped before its use."""


class Ends(NamedTuple):
    """after_ids: tokens that a constraint begins behind. ending_ids: those that end a sequence."""

    after_ids: tuple[int, ...]
    ending_ids: tuple[int, ...]


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar that is being compiled, or was: once, and again where many rows follow it.

    A failure is kept as what it says: an error that is raised again and again would gather the
    frames of all who met it.
    """

    future: Future[Start | ErrorInfo]
    again: Callable[[], Future[Start | ErrorInfo]]
    new_states: Callable[[Ends], States]
    found: dict[Ends, States] = field(default_factory=dict)
    more: list[Future[Start | ErrorInfo]] = field(default_factory=list)

    def done(self) -> bool:
        """Whether it is there, or will never be."""
        return self.future.done()

    def starts(self) -> list[Start]:
        """Matchers at the beginning of the grammar, not to be moved; those that are there. For when
        it is done; raises the error of `compile_grammar`."""
        first = self.future.result()
        if isinstance(first, ErrorInfo):
            raise by_name(first.kind, first.message, first.field)
        others = (future.result() for future in self.more if future.done())
        return [first, *(start for start in others if isinstance(start, Start))]

    def states(self, ends: Ends) -> States:
        """The states of its outputs. For when it is done. Called by one thread."""
        states = self.found.get(ends)
        if states is None:
            if len(self.found) >= _MOST_ENDS:
                self.found.pop(next(iter(self.found)))
            states = self.found[ends] = self.new_states(ends)
        return states

    def grow(self, num: int) -> None:
        """Have `num` starts, once they are compiled. Called by one thread."""
        while 1 + len(self.more) < num:
            self.more.append(self.again())


@dataclass(frozen=True)
class _Compiler:
    tokenizer: LLTokenizer
    special: dict[str, int]
    tokens: list[bytes]
    lengths: TokenLengths


class CompiledGrammars:
    """By kind and source. Called by one thread."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        """load: the model's tokens; called once, by `load`, or in a thread when the first grammar
        is asked for."""
        self._load = load
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._found: OrderedDict[tuple[str, str], CompiledGrammar] = OrderedDict()
        self._compiler: _Compiler | None = None
        self._loading = threading.Lock()
        self._serials = count()

    def load(self) -> None:
        """Read the model's tokens now. A model that has none, or none that can be read, says so to
        the first grammar."""
        try:
            self._loaded()
        except SlipstreamError as error:
            logger.info("no grammars: %s", error)
        except Exception:
            # A boundary: what no grammar asks for must not be in the way of others.
            logger.exception("no grammars")

    def get(self, grammar: Grammar) -> CompiledGrammar:
        """The grammar, which is begun now if it was not."""
        key = grammar.kind, grammar.source
        found = self._found.get(key)
        if found is None:

            def again() -> Future[Start | ErrorInfo]:
                with stack_of(LEADERS_STACK_BYTES):
                    return self._pool.submit(self._compile, grammar)

            found = self._found[key] = CompiledGrammar(
                again(), again, lambda ends: self._states(grammar, ends)
            )
            self._drop_old()
        else:
            self._found.move_to_end(key)
        return found

    def prepare(self, grammar: Grammar) -> bool:
        """Whether `get` is done; begins it unless too many are under way."""
        if (grammar.kind, grammar.source) not in self._found:
            pending = sum(not found.done() for found in self._found.values())
            if pending >= _MOST_PENDING:
                return False
        return self.get(grammar).done()

    def close(self) -> None:
        """Begin nothing more. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> Start | ErrorInfo:
        try:
            return Start(matcher=self._compiled(grammar), serial=next(self._serials))
        except SlipstreamError as error:
            return error_info(error)
        except Exception as error:
            # A boundary: what is no error of ours is that of whoever wanted this grammar.
            logger.exception("a grammar of kind %s", grammar.kind)
            return ErrorInfo(
                kind=MaskError.__name__,
                message=f"the grammar could not be compiled: {type(error).__name__}: {error}",
                field="grammar",
            )

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        compiler = self._loaded()
        return compile_grammar(grammar, compiler.tokenizer, compiler.special)

    def _states(self, grammar: Grammar, ends: Ends) -> States:
        loaded, schema = self._loaded(), schema_of(grammar)
        tokens = loaded.tokens
        reader = OutputsAlike() if schema is None else JsonText(schema, tokens, loaded.lengths)
        return States(reader, tokens, ending_ids=ends.ending_ids, after_ids=ends.after_ids)

    def _loaded(self) -> _Compiler:
        with self._loading:
            if self._compiler is None:
                vocabulary = self._load()
                self._compiler = _Compiler(
                    llguidance_tokenizer(vocabulary),
                    vocabulary.special_tokens(),
                    vocabulary.tokens,
                    token_lengths(vocabulary.tokens),
                )
            return self._compiler

    def _drop_old(self) -> None:
        surplus = len(self._found) - _MOST_KEPT
        if surplus <= 0:
            return
        # The oldest that is done; one that is not is awaited.
        old = [key for key, found in self._found.items() if found.done()][:surplus]
        for key in old:
            del self._found[key]
