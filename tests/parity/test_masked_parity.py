"""Requests with `allowed_token_ids` on a real model: they draw what is allowed, by the law of the
model; nobody beside them changes by a bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.config import (
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from engine.protocol import BeginUpdate, CommitUpdate, LoadFromDisk, Pause, Request, Resume
from engine.protocol.deadlines import MEET_S
from kernels.sampling.philox import philox_uniform
from rollout.launch import launch
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.same_outputs import logprob_noise
from tests.helpers.samplers import SAMPLERS
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.slow

PROMPT = list(range(5, 30))
ALLOWED = [3, 4, 17, 40, 41, 66, 90]
SIZE = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found: Path = tmp_path_factory.mktemp("tiny")
    write_tiny(found, "llama")
    return found


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def masked(rid: str, allowed: Sequence[int] = ALLOWED, *, seed: int = 0, **fields: Any) -> Request:
    own = {name: fields.pop(name) for name in Request.__struct_fields__ if name in fields}
    group, stop_ids = own.pop("group", ""), own.pop("stop_ids", ())
    fields.setdefault("max_new_tokens", SIZE)
    asked = request(rid, PROMPT, seed=seed, group=group, stop_ids=stop_ids, **fields)
    return msgspec.structs.replace(asked, allowed_token_ids=np.array(allowed, np.int32), **own)


def plain(rid: str, *, seed: int = 0, **fields: Any) -> Request:
    return msgspec.structs.replace(masked(rid, seed=seed, **fields), allowed_token_ids=None)


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "overlap"])
def replica(request: pytest.FixtureRequest, folder: Path) -> Iterator[InlineReplica]:
    with make_replica(folder, overlap=request.param) as made:
        yield made


@torch.no_grad()
def drawn_by_hand(model: Any, asked: Request, output: Sequence[int]) -> int:
    """The token behind `output`: by a cumulative sum over the allowed ones, in double precision."""
    known = torch.tensor([[*asked.prompt_ids.tolist(), *output]])
    logits_V = model(known).logits[0, -1].double()
    allowed = torch.tensor(sorted(set(asked.allowed_token_ids.tolist())))
    if asked.sampling.temperature < 1e-6:
        return int(allowed[logits_V[allowed].argmax()])
    law = (logits_V[allowed] / asked.sampling.temperature).softmax(-1)
    uniform = philox_uniform(torch.tensor([asked.seed]), torch.tensor([known.shape[1]]))
    return int(allowed[int((law.cumsum(-1) <= uniform).sum())])


@pytest.mark.parametrize("name", ["greedy", "plain", "cold"])
def test_tokens_are_drawn_from_what_is_allowed_by_the_models_law(
    replica: InlineReplica, model: Any, name: str
) -> None:
    asked = [masked(f"m{seed}", seed=seed, **SAMPLERS[name]) for seed in range(6)]
    replica.submit(asked)
    finals = drain(replica)
    for one in asked:
        tokens = finals[one.rid].token_ids.tolist()
        assert len(tokens) == SIZE
        for at, token in enumerate(tokens):
            assert token == drawn_by_hand(model, one, tokens[:at])
        scale = one.sampling.temperature if one.sampling.temperature > 1e-6 else 1.0
        want = exact_logprobs(model, PROMPT, tokens, scale)
        np.testing.assert_allclose(finals[one.rid].logprobs, want, atol=logprob_noise(scale))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_allowed_tokens_whose_numbers_are_of_the_whole_law(
    replica: InlineReplica, name: str
) -> None:
    """The witness of each token is a request that goes on from those before it without a mask."""
    allowed = [*ALLOWED, 2, 20]
    fields = {"stop_ids": SAMPLERS[name].get("stop_token_ids", ()), "max_new_tokens": 20}
    asked = masked("m", allowed, entropy=True, top_logprobs=4, **fields, **SAMPLERS[name])
    replica.submit([asked])
    output = drain(replica)["m"]
    tokens = output.token_ids.tolist()
    assert tokens and set(tokens) <= set(allowed)
    for at, token in enumerate(tokens):
        alone = msgspec.structs.replace(
            asked,
            rid=f"w{at}",
            allowed_token_ids=None,
            output_ids=np.array(tokens[:at], np.int32) if at else None,
            hold_at=at + 1,
            logprob_ids=[token],
        )
        replica.submit([alone])
        witness = drain(replica)[alone.rid]
        assert float(output.logprobs[at]) == pytest.approx(
            float(witness.top.logprobs[0, -1]), abs=1e-5
        )
        assert float(output.entropies[at]) == pytest.approx(float(witness.entropies[0]), abs=1e-5)
        assert output.top.ids[at].tolist() == witness.top.ids[0, :4].tolist()


def test_who_is_beside_a_masked_request_does_not_change_by_a_bit(replica: InlineReplica) -> None:
    """In batches of the same shape, so that the products sum alike."""
    others = [plain(f"p{seed}", seed=seed, group="g", entropy=True) for seed in range(3)]
    found = []
    for beside in (masked("m", seed=9, group="g"), plain("m", seed=9, group="g")):
        replica.submit([*others, beside])
        found.append(drain(replica))
    for one in others:
        with_mask, without = (finals[one.rid] for finals in found)
        assert with_mask.token_ids.tobytes() == without.token_ids.tobytes()
        assert with_mask.logprobs.tobytes() == without.logprobs.tobytes()
        assert with_mask.entropies.tobytes() == without.entropies.tobytes()


def test_samples_of_a_group_streams_and_continued_replies(replica: InlineReplica) -> None:
    asked = [masked(f"s{seed}", seed=seed, group="s", stream=True) for seed in range(4)]
    replica.submit(asked)
    streamed: dict[str, list[int]] = {one.rid: [] for one in asked}
    while not replica.idle():
        for output in replica.step():
            assert output.start == len(streamed[output.rid])
            streamed[output.rid] += output.token_ids.tolist()
    whole = [masked(f"w{seed}", seed=seed) for seed in range(4)]
    replica.submit(whole)
    finals = drain(replica)
    for seed, one in enumerate(whole):
        tokens = finals[one.rid].token_ids
        assert streamed[f"s{seed}"] == tokens.tolist()
        rest = msgspec.structs.replace(one, rid=f"c{seed}", output_ids=tokens[:5])
        replica.submit([rest])
        assert drain(replica)[rest.rid].token_ids.tolist() == tokens[5:].tolist()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_pool_that_is_too_small_pauses_and_an_update_change_nothing(
    folder: Path, overlap: bool
) -> None:
    asked = [masked(f"m{seed}", seed=seed) for seed in range(6)]
    asked += [plain(f"p{seed}", seed=seed) for seed in range(6)]
    with make_replica(folder, overlap=overlap) as roomy:
        roomy.submit(asked)
        want = {rid: output.token_ids.tolist() for rid, output in drain(roomy).items()}
    with make_replica(folder, overlap=overlap, num_pages=20, page_size=4) as small:
        small.submit(asked)
        finals = {}
        for number in range(10_000):
            finals |= {o.rid: o for o in small.step() if o.finish is not None}
            if number == 3:
                small.send(Pause(mode="retract"))
                small.send(Resume())
                at_pause = small.state().num_retractions
                assert at_pause > 0
            if number == 6:
                small.send(BeginUpdate(version=1))
                small.send(LoadFromDisk(path=str(folder)))
                small.send(CommitUpdate(version=1))
            if small.idle():
                break
        assert small.state().num_retractions > at_pause
    assert {rid: output.token_ids.tolist() for rid, output in finals.items()} == want


@pytest.mark.parametrize("overlap", [False, True])
def test_beside_drafts_tokens_are_those_of_plain_decoding(folder: Path, overlap: bool) -> None:
    """Masked requests that come and go among rows that verify drafts, whose lengths the leader
    does not know when it plans the step that waits for masks."""
    asked = [masked(f"m{seed}", seed=seed, max_new_tokens=4) for seed in range(2)]
    long = {"temperature": 0.1, "max_new_tokens": 40}
    asked += [plain(f"p{seed}", seed=seed, **long) for seed in range(3)]
    late = [masked(f"l{seed}", [9], seed=seed, max_new_tokens=5) for seed in range(2)]
    found = []
    for method in ("off", "ngram"):
        config = EngineConfig(
            model=str(folder),
            dtype="float32",
            device="cpu",
            cache=CacheConfig(num_pages=200, page_size=8),
            scheduler=SchedulerConfig(max_running=8, overlap=overlap, check_integrity=True),
            speculative=SpeculativeConfig(method=method, draft_tokens=3),
        )
        with launch(config) as engine:
            engine.submit(asked)
            finals = {}
            for number in range(1000):
                if number in (9, 14):
                    engine.submit([late[number > 9]])
                finals |= {o.rid: o for o in engine.step() if o.finish is not None}
                if number > 14 and engine.idle():
                    break
        found.append(finals)
    plainly, drafting = found
    drafted = 0
    for rid, output in plainly.items():
        assert drafting[rid].token_ids.tolist() == output.token_ids.tolist(), rid
        atol = logprob_noise(long["temperature"])
        np.testing.assert_allclose(drafting[rid].logprobs, output.logprobs, atol=atol)
        spec = drafting[rid].spec
        own = 0 if spec is None else spec.drafted
        assert rid.startswith("p") or own == 0
        drafted += own
    assert drafted > 10 and len(plainly) == 7


def test_ranks_give_what_one_rank_gives(folder: Path, replica: InlineReplica) -> None:
    asked = [masked(f"m{seed}", seed=seed) for seed in range(3)] + [plain("p", seed=3)]
    replica.submit(asked)
    want = drain(replica)
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=100, page_size=8),
        scheduler=SchedulerConfig(max_running=8, max_step_tokens=64, max_chunk_tokens=24),
        parallel=ParallelConfig(tp_size=2, timeout_s=MEET_S),
    )
    executor = ThreadedExecutor(config)
    with InlineReplica(config, executor) as ranks:
        ranks.submit(asked)
        got = drain(ranks)
    for rid, output in want.items():
        assert got[rid].token_ids.tolist() == output.token_ids.tolist()
        np.testing.assert_allclose(got[rid].logprobs, output.logprobs, atol=1e-4)
    for first, second in executor.all_results:
        assert first.token_ids.tobytes() == second.token_ids.tobytes()
        assert first.logprobs.tobytes() == second.logprobs.tobytes()
