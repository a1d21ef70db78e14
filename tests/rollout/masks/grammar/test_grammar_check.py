"""Grammars tried before they reach the engine: what is refused, in bounded time and memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

from engine.errors import InvalidRequest
from engine.protocol import Grammar
from rollout.jobs.job_process import JobLate, JobProcess
from rollout.masks.grammar.check import GrammarCheck
from rollout.masks.grammar.stack import LEADERS_STACK_BYTES, TRIALS_STACK_BYTES
from tests.helpers.children import ROOT, child_environment
from tests.helpers.fake_executor import VOCAB_SIZE
from tests.helpers.grammars import schema_grammar
from tests.helpers.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def check() -> Iterator[GrammarCheck]:
    made = GrammarCheck(tiny_tokenizer(), limit_s=20.0)
    yield made
    made.close()


BOMBS = {
    "nested repetitions": Grammar(kind="regex", source="((a{1000}){1000}){1000}"),
    "many states": Grammar(kind="regex", source="(a|b)*a(a|b){400}(c|d)*c(c|d){400}"),
    "deep schema": Grammar(kind="json_schema", source='{"items":' * 10_000 + "1" + "}" * 10_000),
    "deep text": Grammar(kind="json_schema", source="[" * 100_000),
    "deep lark": Grammar(kind="lark", source="start: " + "(" * 100_000),
    "doubling rules": Grammar(
        kind="ebnf",
        source="root ::= r0\n"
        + "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(60))
        + '\nr60 ::= "a" | "b"',
    ),
    "doubling schema": Grammar(
        kind="json_schema",
        source='{"$ref": "#/$defs/d0", "$defs": {'
        + ",".join(
            f'"d{n}": {{"allOf": [{{"$ref": "#/$defs/d{n + 1}"}}, {{"$ref": "#/$defs/d{n + 1}"}}]}}'
            for n in range(40)
        )
        + ', "d40": {"type": "string"}}}',
    ),
    "counts": Grammar(kind="json_schema", source='{"type": "string", "minLength": 2000000000}'),
    "items": Grammar(
        kind="json_schema",
        source='{"items": {"items": {"items": {"type": "string"}, "minItems": 100000}, '
        '"minItems": 100000}, "minItems": 100000, "type": "array"}',
    ),
    "alternatives": Grammar(
        kind="regex", source="|".join(f"{n:x}{'z' * (n % 50)}" for n in range(6000))
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_served_and_the_next_grammar_is_tried(
    check: GrammarCheck, name: str
) -> None:
    try:
        check.check(BOMBS[name], VOCAB_SIZE)
    except InvalidRequest as error:
        assert error.field == "grammar" and len(error.message) < 1000
    check.check(Grammar(kind="regex", source=f"after {name}"), VOCAB_SIZE)


def test_a_process_that_gives_no_answer_is_over_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JobProcess, "run", lambda *_: None)
    made = GrammarCheck(tiny_tokenizer(), limit_s=7.0, memory_bytes=1 << 20)
    with pytest.raises(InvalidRequest, match="longer than 7 s to compile, more than 1 MiB"):
        made.check(Grammar(kind="regex", source="a"), VOCAB_SIZE)
    made.close()


def test_a_grammar_that_could_not_be_tried_in_time_is_not_held_to_be_bad(
    check: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = Grammar(kind="regex", source="late")

    def late(*_: object) -> bytes:
        raise JobLate("the machine is busy")

    monkeypatch.setattr(JobProcess, "run", late)
    with pytest.raises(JobLate):
        check.check(grammar, VOCAB_SIZE)
    monkeypatch.undo()
    check.check(grammar, VOCAB_SIZE)


def test_a_grammar_is_tried_once(check: GrammarCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Grammar(kind="regex", source="once"), schema_grammar({"not": {}})
    check.check(good, VOCAB_SIZE)
    with pytest.raises(InvalidRequest):
        check.check(bad, VOCAB_SIZE)
    monkeypatch.setattr(check, "_tried", None)
    check.check(good, VOCAB_SIZE)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="'not'"):
            check.check(bad, VOCAB_SIZE)


def test_the_event_loop_goes_on_meanwhile(check: GrammarCheck) -> None:
    async def test() -> None:
        waiting = asyncio.ensure_future(
            check.checked(Grammar(kind="regex", source="b{900}"), VOCAB_SIZE)
        )
        turns = 0
        while not waiting.done():
            await asyncio.sleep(0)
            turns += 1
        await waiting
        assert turns > 1

    asyncio.run(test())


@pytest.mark.parametrize(
    "grammar",
    [
        schema_grammar({"allOf": [{"type": "string"}, {"type": "null"}]}),
        schema_grammar({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        Grammar(kind="ebnf", source="root ::= root"),
    ],
)
def test_nothing_fits(check: GrammarCheck, grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest, match=r"no text fits it$|Unsatisfiable"):
        check.check(grammar, VOCAB_SIZE)


def test_what_a_trial_takes_for_too_deep_ends_no_leader(check: GrammarCheck) -> None:
    """Recursion beyond a stack ends a process: the trial's, whose stack is the smaller one."""
    assert TRIALS_STACK_BYTES < LEADERS_STACK_BYTES
    with pytest.raises(InvalidRequest, match="rules deep"):
        check.check(CHAIN, VOCAB_SIZE)
    check.check(Grammar(kind="regex", source="a"), VOCAB_SIZE)
    code = (
        "from rollout.masks.grammar.compiled import CompiledGrammars\n"
        "from tests.helpers.grammars import tiny_vocabulary\n"
        "from tests.rollout.masks.grammar.test_grammar_check import CHAIN\n"
        "made = CompiledGrammars(tiny_vocabulary)\n"
        "print(len(made.get(CHAIN).future.result().matcher.get_error()))\n"
        "made.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=child_environment(), capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"0\n"), done.stderr


CHAIN = Grammar(
    kind="ebnf",
    source="root ::= r0\n"
    + "\n".join(f'r{n} ::= "a" r{n + 1} | "b"' for n in range(2500))
    + '\nr2500 ::= "a"',
)


def test_a_model_without_a_tokenizer() -> None:
    with pytest.raises(InvalidRequest, match="tokenizer"):
        GrammarCheck(None).check(Grammar(kind="regex", source="a"), VOCAB_SIZE)
