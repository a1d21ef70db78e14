"""Requests with grammars on a real model of random weights: every text that stops fits, and the
logprobs are those of a plain forward pass, over the vocabulary or over what might come."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.protocol import Grammar, Pause, Request, Resume
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.fake_executor import EOS_ID, VOCAB_SIZE
from tests.helpers.grammars import compiled, schema_grammar, tiny_vocabulary
from tests.helpers.same_outputs import logprob_noise
from tests.helpers.schemas import is_valid, random_schema
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import BOS_ID, tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPT = list(range(5, 15))
LIST = schema_grammar(
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 6}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("tiny")
    write_tiny(
        found,
        "llama",
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=1024,
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
    )
    tiny_tokenizer().write_hf(found)
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "overlap"])
def replica(request: pytest.FixtureRequest, folder: Path) -> Iterator[InlineReplica]:
    with make_replica(folder, overlap=request.param, num_pages=1200) as made:
        yield made


def asked(rid: str, grammar: Grammar, *, seed: int = 0, **fields: Any) -> Request:
    own = {name: fields.pop(name) for name in Request.__struct_fields__ if name in fields}
    fields.setdefault("max_new_tokens", 250)
    made = request(rid, PROMPT, seed=seed, stop_ids=[EOS_ID], **fields)
    return msgspec.structs.replace(made, grammar=grammar, **own)


def test_every_text_that_stops_fits_its_schema(replica: InlineReplica) -> None:
    rng = random.Random(23)
    schemas = [random_schema(rng) for _ in range(16)]
    samplers = [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20, "temperature": 1.5}]
    replica.submit(
        [
            asked(f"s{n}", schema_grammar(schema), seed=n, **samplers[n % 4])
            for n, schema in enumerate(schemas)
        ]
    )
    found = drain(replica)
    num_stopped = 0
    for number, schema in enumerate(schemas):
        output = found[f"s{number}"]
        text = tiny_tokenizer().decode(output.token_ids)
        if output.finish.type == "stop":
            num_stopped += 1
            assert is_valid(schema, text), (schema, text)
        else:
            assert output.finish.type == "length" and len(output.token_ids) == 250
    assert num_stopped >= 12


def test_logprobs_are_those_of_a_plain_forward_pass(replica: InlineReplica, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for temperature in (1.0, 0.7):
        laws = {}
        for law in ("model", "masked"):
            one = asked(law, LIST, seed=4, temperature=temperature, logprob_law=law, top_logprobs=2)
            replica.submit([one])
            laws[law] = drain(replica)[law]
        tokens = laws["model"].token_ids.tolist()
        assert laws["masked"].token_ids.tolist() == tokens and len(tokens) > 2
        want = exact_logprobs(model, PROMPT, tokens, temperature)
        noise = logprob_noise(temperature)
        np.testing.assert_allclose(laws["model"].logprobs, want, atol=noise)
        own = masked_logprobs(model, tokens, temperature)
        np.testing.assert_allclose(laws["masked"].logprobs, own, atol=noise)
        assert float(laws["masked"].logprobs.sum()) > float(laws["model"].logprobs.sum())


@torch.no_grad()
def masked_logprobs(model: Any, tokens: list[int], temperature: float) -> list[float]:
    """Of each token, among those that the grammar lets come where it came."""
    logits = model(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1].double()
    matcher, found = compiled(LIST).deep_copy(), []
    end = tiny_vocabulary().end_id
    for row, token in zip(logits / temperature, tokens, strict=True):
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        allowed = [EOS_ID if one == end else one for one in allowed if one <= end]
        law = row[allowed].log_softmax(-1)
        found.append(float(law[allowed.index(token)]))
        if token != EOS_ID:
            assert matcher.consume_token(token)
    return found


def test_cut_and_continued_and_retracted_it_has_the_same_tokens(replica: InlineReplica) -> None:
    replica.submit([asked("w", LIST, seed=9)])
    whole = drain(replica)["w"].token_ids.tolist()
    assert len(whole) >= 5
    for cut in range(1, len(whole), 3):
        replica.submit([asked("h", LIST, seed=9, hold_at=cut)])
        first = drain(replica)["h"].token_ids
        replica.submit([asked("r", LIST, seed=9, output_ids=first)])
        rest = drain(replica)["r"].token_ids.tolist()
        assert [*first.tolist(), *rest] == whole
    replica.submit([asked("p", LIST, seed=9)])
    before = replica.state().num_output_tokens
    while replica.state().num_output_tokens < before + 3:
        replica.step()
    replica.send(Pause(mode="retract"))
    replica.send(Resume())
    assert drain(replica)["p"].token_ids.tolist() == whole
