"""What the benchmarks of fp8 KV compute besides clocks: the shift of logprobs, bytes of a token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_figures_of_a_shift() -> None:
    from kv_dtype_shift import figures

    before = [np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)]
    after = [np.array([-1.5, -2.0], np.float32), np.array([-2.75], np.float32)]
    got = figures(before, after)
    assert got["mean"] == pytest.approx(0.25)
    assert got["max"] == pytest.approx(0.5)
    k3 = [np.exp(d) - 1 - d for d in (-0.5, 0.0, 0.25)]
    assert got["k3"] == pytest.approx(np.mean(k3))
    assert figures(before, before) == {"mean": 0.0, "max": 0.0, "k3": 0.0}


def test_the_floor_counts_what_is_kept(tmp_path: Path) -> None:
    """28 layers, 2 heads of 128, keys and values: 256 bytes each, or 128 codes and a scale."""
    from gpu_rollout import model_bytes

    sizes = {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 1536}
    config = {**sizes, "num_hidden_layers": 28, "vocab_size": 9, "tie_word_embeddings": True}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert model_bytes(str(path), 10).kv_bytes_per_token == 2 * 28 * 2 * 256
    assert model_bytes(str(path), 10, kv_dtype="fp8_e4m3").kv_bytes_per_token == 2 * 28 * 2 * 130
