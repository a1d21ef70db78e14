"""Peers of the rollout benchmark: what is asked of them, and transformers on a tiny shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rollout_peers

    return rollout_peers


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_asks_are_the_workload(peers) -> None:
    asks = peers.asks("wa", 100, seed=1, shorten=1)
    assert len(asks) == 256
    assert sum(len(ask.prompt_ids) for ask in asks) == 142_827
    assert sum(ask.num_tokens for ask in asks) == 133_966
    group = peers.asks("group8", 100, seed=1, shorten=2)
    assert group[0].prompt_ids == group[15].prompt_ids != group[16].prompt_ids
    assert {ask.num_tokens for ask in group} == {256}


@pytest.mark.parametrize(
    ("answer", "logprobs", "fine"),
    [((4, 4), True, True), ((4, 0), False, True), ((4, 0), True, False), ((3, 3), True, False)],
)
def test_a_peer_that_stops_early_is_found_out(peers, answer, logprobs: bool, fine: bool) -> None:
    work, answers = [peers.Ask([1, 2], 4)], [peers.Answer(*answer)]
    if fine:
        peers.check(work, answers, logprobs=logprobs)
    else:
        with pytest.raises(RuntimeError, match="request 0"):
            peers.check(work, answers, logprobs=logprobs)


@pytest.mark.slow
@pytest.mark.parametrize("logprobs", [True, False])
def test_transformers_runs_a_workload(peers, tiny: str, logprobs: bool) -> None:
    options = peers.PeerOptions(
        peer="transformers",
        model=tiny,
        workload="single",
        shorten=32,
        logprobs=logprobs,
        timeout_s=60.0,
    )
    found = peers.measure(options)
    assert found["tokens"] == 8
    assert found["tokens_per_s"] == pytest.approx(8 / found["seconds"])
    assert found["logprobs"] is logprobs


def test_a_peer_that_fails_is_reported(peers) -> None:
    options = peers.PeerOptions(peer="transformers", model="/nowhere", workload="single")
    found = peers.run_in_process(options)
    assert set(found) == {"error"}
    assert "/nowhere" in found["error"]


def test_a_peer_that_hangs_is_ended(peers, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    options = peers.PeerOptions(peer="vllm", model="/nowhere", workload="single", timeout_s=0.2)
    assert peers.run_in_process(options) == {"error": "not done within 0.2 s"}
