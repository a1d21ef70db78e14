"""Samples that draft from each other follow the model's law and are independent; and ranks that
share a model draft, verify and accept alike."""

from __future__ import annotations

from pathlib import Path

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
from engine.protocol import Request, RequestOutput
from engine.protocol.deadlines import MEET_S
from rollout.replica.inline import InlineReplica
from tests.helpers.drafters import DraftingEngine
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.same_outputs import SameOutputs
from tests.helpers.thread_ranks import ThreadedExecutor
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.slow

PROMPT, VOCAB = [3, 14, 15, 9, 26], 40
COLD = 0.4
"""A temperature at which siblings often agree."""


def pairs_law(model: torch.nn.Module) -> np.ndarray:
    """Probability of the second and third output tokens, float64 [V, V]: the first verified step
    draws both, the third behind a draft of the second."""
    with_first = [[*PROMPT, token] for token in range(VOCAB)]
    with_second = [[*text, token] for text in with_first for token in range(VOCAB)]
    first_V = last_law(model, [PROMPT])[0]
    second_VV = last_law(model, with_first)
    third_VVV = last_law(model, with_second).reshape(VOCAB, VOCAB, VOCAB)
    return np.einsum("a,ab,abc->bc", first_V, second_VV, third_VVV)


@torch.no_grad()
def last_law(model: torch.nn.Module, texts: list[list[int]]) -> np.ndarray:
    """Law of the token behind each of several texts of one length, float64 [texts, V]."""
    law: np.ndarray = (model(torch.tensor(texts)).logits[:, -1].double() / COLD).softmax(-1).numpy()
    return law


def sibling(nth: int) -> Request:
    return request(
        str(nth), PROMPT, seed=1_000_003 * nth, group="g", temperature=COLD, max_new_tokens=3
    )


def sample_siblings(folder: Path, count: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The second and third token of each of many samples of one prompt, in the order of their
    seeds; and how many drafts there were and came true."""
    found: dict[str, RequestOutput] = {}
    with DraftingEngine(folder, max_running=64) as engine:
        # In waves, since rows draft nothing beside a prompt.
        for start in range(0, count, 64):
            engine.replica.submit([sibling(nth) for nth in range(start, min(start + 64, count))])
            found |= drain(engine.replica)
    specs = [output.spec for output in found.values() if output.spec is not None]
    tokens = np.array([found[str(nth)].token_ids[1:3] for nth in range(count)])
    return tokens, (sum(one.drafted for one in specs), sum(one.accepted for one in specs))


def check_law(tmp_path: Path, count: int) -> None:
    law_VV = pairs_law(write_tiny(tmp_path, "llama", vocab_size=VOCAB))
    tokens_N2, (drafted, accepted) = sample_siblings(tmp_path, count)
    assert drafted > count // 4 and accepted > count // 40
    counts = np.bincount(tokens_N2 @ [VOCAB, 1], minlength=VOCAB * VOCAB)
    statistic, freedom = chi_square(counts, law_VV.reshape(-1) * count)
    # Mean `freedom`, variance 2 * `freedom`: five sigma.
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)
    # Of neighbours, which run together, as many agree by chance as independent ones would.
    left, right = tokens_N2[0::2, 1], tokens_N2[1::2, 1]
    agree = float((law_VV.sum(0) ** 2).sum())
    sigma = np.sqrt(agree * (1 - agree) / len(left))
    assert abs((left == right).mean() - agree) < 5 * sigma
    # Nor does one's token say anything of the other's: covariance of any two tokens' indicators.
    together = np.zeros((VOCAB, VOCAB))
    np.add.at(together, (left, right), 1.0)
    marginal = law_VV.sum(0)
    statistic, freedom = chi_square(
        together.reshape(-1), np.outer(marginal, marginal).reshape(-1) * len(left)
    )
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The statistic and its degrees of freedom, rare classes pooled to >= 5 expected."""
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    rare = int(np.searchsorted(expected, 5.0))
    counts = np.concatenate([[counts[:rare].sum()], counts[rare:]])
    expected = np.concatenate([[expected[:rare].sum()], expected[rare:]])
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def test_siblings_follow_the_law(tmp_path: Path) -> None:
    check_law(tmp_path, 4000)


@pytest.mark.long
def test_twenty_thousand_siblings_follow_the_law(tmp_path: Path) -> None:
    check_law(tmp_path, 20_000)


def repeating_requests() -> list[Request]:
    prompt = [7, 8, 9, 7, 8, 9, 7, 8, 9, 7]
    return [
        *[
            request(f"g{n}", prompt, seed=n, group="g", temperature=0.3, max_new_tokens=24)
            for n in range(4)
        ],
        request("greedy", prompt[:7], temperature=0.0, max_new_tokens=24),
        request("filtered", prompt, seed=3, top_k=5, top_p=0.9, max_new_tokens=24),
        request("penalised", prompt, seed=5, frequency_penalty=0.5, max_new_tokens=24),
    ]


def run_ranks(folder: Path, tp_size: int) -> tuple[dict[str, RequestOutput], ThreadedExecutor]:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        cache=CacheConfig(num_pages=100, page_size=8),
        scheduler=SchedulerConfig(max_running=8, max_step_tokens=64, max_chunk_tokens=24),
        parallel=ParallelConfig(tp_size=tp_size, timeout_s=MEET_S),
        speculative=SpeculativeConfig(method="ngram"),
    )
    executor = ThreadedExecutor(config)
    with InlineReplica(config, executor) as replica:
        replica.submit(repeating_requests())
        return drain(replica), executor


def test_ranks_draft_and_accept_alike(tmp_path: Path) -> None:
    model = write_tiny(tmp_path, "llama", tie_word_embeddings=True, num_key_value_heads=2)
    with make_replica(tmp_path) as replica:
        replica.submit(repeating_requests())
        plain = drain(replica)
    alone, _ = run_ranks(tmp_path, 1)
    together, ranks = run_ranks(tmp_path, 2)
    assert sum(one.spec.accepted for one in alone.values() if one.spec is not None) > 0
    SameOutputs(model).same(repeating_requests(), alone, plain)
    SameOutputs(model).same(repeating_requests(), together, plain)
    assert any(results[0].counts is not None for results in ranks.all_results)
    for first, second in ranks.all_results:
        assert first.token_ids.tobytes() == second.token_ids.tobytes()
        assert first.logprobs.tobytes() == second.logprobs.tobytes()
        for name in ("counts", "drafted"):
            left, right = getattr(first, name), getattr(second, name)
            assert (left is None) == (right is None)
            assert left is None or left.tobytes() == right.tobytes()
