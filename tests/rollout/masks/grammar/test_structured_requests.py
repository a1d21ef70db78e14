"""Requests with grammars on a fake engine: their texts, continued, retracted and restarted, and
what those beside them notice."""

from __future__ import annotations

import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.protocol import Grammar, Pause, Request, RequestOutput, Resume
from rollout.masks.grammar.source import GrammarMasks
from rollout.replica.inline import InlineReplica
from rollout.replica.leader import Leader
from tests.helpers.fake_executor import EOS_ID, FakeExecutor, expected_tokens
from tests.helpers.grammars import ids_in, schema_grammar
from tests.helpers.replicas import fake_config, inline, make_request, spawned
from tests.helpers.schemas import is_valid, random_schema
from tests.helpers.text_models import fake_text_model
from tests.helpers.tiny_tokenizer import tiny_tokenizer

FOUR = schema_grammar(
    {"type": "array", "items": {"enum": [1, 20, 300]}, "minItems": 4, "maxItems": 4}
)
CHOICE = Grammar(kind="choice", source='["first", "fourth", "second"]')


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fake_text_model(tmp_path_factory.mktemp("fake"))


def asked(rid: str, grammar: Grammar | None = CHOICE, **fields: Any) -> Request:
    prompt = fields.pop("prompt", [1, 2, 3])
    own = {name: fields.pop(name) for name in Request.__struct_fields__ if name in fields}
    fields.setdefault("max_new_tokens", 300)
    request = make_request(rid, prompt, **fields)
    return msgspec.structs.replace(request, grammar=grammar, stop_ids=[EOS_ID], **own)


def finals(replica: InlineReplica, limit: int = 100_000) -> dict[str, RequestOutput]:
    found: dict[str, RequestOutput] = {}
    for _ in range(limit):
        found |= {o.rid: o for o in replica.step() if o.finish is not None}
        if replica.idle():
            return found
    raise AssertionError("it did not become idle")


def text_of(output: RequestOutput) -> str:
    return tiny_tokenizer().decode(output.token_ids)


def alone(model: str, request: Request) -> RequestOutput:
    with inline(model) as replica:
        replica.submit([request])
        return finals(replica)[request.rid]


@pytest.mark.parametrize("overlap", [False, True])
def test_every_output_that_stops_fits_its_schema(model: str, overlap: bool) -> None:
    rng = random.Random(11)
    schemas = [random_schema(rng) for _ in range(40)]
    with inline(model, overlap=overlap) as replica:
        replica.submit(
            [
                asked(f"s{n}", schema_grammar(schema), prompt=[1 + n, 2 + 3 * n])
                for n, schema in enumerate(schemas)
            ]
            + [asked(f"p{n}", None, prompt=[n, 5], max_new_tokens=9) for n in range(5)]
        )
        found = finals(replica)
    ends = [found[f"s{n}"].finish.type for n in range(len(schemas))]
    assert set(ends) <= {"stop", "length"} and ends.count("stop") >= 30
    for number, schema in enumerate(schemas):
        output = found[f"s{number}"]
        if output.finish.type == "stop":
            assert output.finish.matched == EOS_ID
            assert is_valid(schema, text_of(output)), (schema, text_of(output))
    for number in range(5):
        want = expected_tokens([number, 5], 9)
        assert found[f"p{number}"].token_ids.tolist() == want


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_request_that_is_continued_has_the_tokens_of_one_that_was_not(
    model: str, cut: int
) -> None:
    whole = alone(model, asked("w", FOUR)).token_ids
    held = alone(model, asked("h", FOUR, hold_at=cut))
    assert held.token_ids.tolist() == whole[:cut].tolist() and held.finish.type == "hold"
    rest = alone(model, asked("r", FOUR, output_ids=held.token_ids))
    assert rest.token_ids.tolist() == whole[cut:].tolist()


def test_tokens_to_continue_that_are_not_of_the_grammar(model: str) -> None:
    output = alone(model, asked("a", output_ids=np.array(ids_in("fx"), np.int32)))
    assert output.finish.error == "UnmetConstraint" and "grammar" in output.finish.message
    assert output.finish.field == "grammar"


WIDE = Grammar(
    kind="lark",
    source="\n".join(
        [
            'start: "z" ' + " ".join(f"r{number}?" for number in range(1500)),
            *(f'r{number}: "{number}" "y"' for number in range(1500)),
        ]
    ),
)
"""Its first mask is cheap, and what comes behind it is more than one request may have."""


@pytest.mark.parametrize(
    "name,request_",
    [
        ("asks for too much", asked("m", WIDE)),
        ("is over too early", asked("m", CHOICE, min_new_tokens=200)),
    ],
)
def test_a_grammar_that_leads_nowhere_is_the_fault_of_its_request(
    model: str, name: str, request_: Request
) -> None:
    with inline(model) as replica:
        replica.submit([request_, asked("b", None, prompt=[4, 5], max_new_tokens=9)])
        found = finals(replica)
    finish = found["m"].finish
    assert (finish.error, finish.field) == ("UnmetConstraint", "grammar"), name
    assert found["m"].token_ids.size > 0
    assert found["b"].token_ids.tolist() == expected_tokens([4, 5], 9)


def test_a_retracted_request_goes_on_as_it_was(model: str) -> None:
    whole = alone(model, asked("a", FOUR)).token_ids
    with inline(model) as replica:
        replica.submit([asked("a", FOUR)])
        for _ in range(200):
            replica.step()
            if replica.state().num_output_tokens >= 3:
                break
        replica.send(Pause(mode="retract"))
        replica.send(Resume())
        output = finals(replica)["a"]
    assert output.num_retractions == 1
    assert output.token_ids.tolist() == whole.tolist()


def test_a_thinking_block_comes_first(model: str) -> None:
    free = expected_tokens([1, 2, 3], 6)
    grammar = msgspec.structs.replace(CHOICE, after_ids=free[2:4])
    output = alone(model, asked("a", grammar))
    assert output.token_ids[:4].tolist() == free[:4]
    tail = tiny_tokenizer().decode(output.token_ids[4:])
    assert tail in ("first", "fourth", "second") and output.finish.type == "stop"


def test_an_output_that_is_too_long_says_so(model: str) -> None:
    output = alone(model, asked("a", max_new_tokens=3))
    assert (output.finish.type, output.finish.length) == ("length", 3)


def test_others_go_on_while_a_grammar_is_compiled(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    with inline(model) as replica:
        source = replica._leader._masked._gate._sources[1]
        assert isinstance(source, GrammarMasks)
        load = source._compiled._load
        monkeypatch.setattr(source._compiled, "_load", lambda: (gate.wait(60), load())[1])
        replica.submit([asked("slow"), asked("quick", None, max_new_tokens=20)])
        outputs: list[RequestOutput] = []
        while not outputs:
            outputs = [o for o in replica.step() if o.finish is not None]
        assert [o.rid for o in outputs] == ["quick"]
        # Alone it waits in the queue, and nothing takes that for a mistake.
        for _ in range(1200):
            assert replica.step() == []
        assert replica.state().num_waiting == 1
        gate.set()
        assert text_of(finals(replica)["slow"]) in ("first", "fourth", "second")


def test_a_request_that_is_aborted_while_its_grammar_is_compiled(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.protocol import Abort

    gate = threading.Event()
    with inline(model) as replica:
        source = replica._leader._masked._gate._sources[1]
        load = source._compiled._load
        monkeypatch.setattr(source._compiled, "_load", lambda: (gate.wait(60), load())[1])
        replica.submit([asked("slow")])
        replica.step()
        replica.send(Abort(rid="slow"))
        assert finals(replica)["slow"].finish.type == "abort"
        gate.set()


def test_a_model_without_a_tokenizer_ends_the_request_alone() -> None:
    with inline() as replica:
        replica.submit([asked("a"), asked("b", None, max_new_tokens=4)])
        found = finals(replica)
    assert found["a"].finish.error == "InvalidRequest"
    assert found["b"].token_ids.tolist() == expected_tokens([1, 2, 3], 4)


@pytest.mark.slow
def test_a_leader_of_its_own_has_loaded_all_before_it_serves(tmp_path: Path) -> None:
    """The first grammar holds up nobody: by then nothing is left to read of the model."""
    folder = fake_text_model(tmp_path)
    with spawned(folder) as replica:
        shutil.rmtree(folder)
        replica.submit([asked("a")])
        found: list[RequestOutput] = []
        deadline = time.monotonic() + 60
        while not found:
            assert time.monotonic() < deadline
            found = [output for output in replica.step() if output.finish is not None]
        assert text_of(found[0]) in ("first", "fourth", "second"), found[0].finish


@pytest.mark.parametrize("wrong", ["no folder", "no tokenizer", "no JSON"])
def test_a_model_without_tokens_serves_all_but_grammars(tmp_path: Path, wrong: str) -> None:
    folder = tmp_path / "model"
    if wrong != "no folder":
        folder.mkdir()
    if wrong == "no JSON":
        (folder / "tokenizer.json").write_text("{")
    config = fake_config(str(folder))
    leader = Leader(config, FakeExecutor(config), loads_grammars=True)
    try:
        leader.submit([asked("a"), asked("b", None, prompt=[4, 5], max_new_tokens=3)])
        found: dict[str, RequestOutput] = {}
        while not leader.idle():
            found |= {o.rid: o for o in leader.step() if o.finish is not None}
        assert found["b"].token_ids.tolist() == expected_tokens([4, 5], 3)
        assert found["a"].finish is not None and found["a"].finish.type == "abort"
    finally:
        leader.close()
