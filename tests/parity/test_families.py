"""Every family through the whole engine on a CPU: pages, chunks, prefixes and updates in place,
against transformers. Texts are longer than the windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from trainer_bridge import push

pytestmark = pytest.mark.slow

PROMPT = list(range(5, 60))
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "smollm3 with windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 21}),
    "gemma3": ("gemma3", {}),
    "gemma3 with a window of a page": ("gemma3", {"sliding_window": 8}),
    "mistral with windows": ("mistral", {"sliding_window": 19}),
    "qwen3 with windows": (
        "qwen3",
        {"sliding_window": 13, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3 with experts": ("qwen3_moe", {}),
    "qwen2 with experts and windows": (
        "qwen2_moe",
        {"sliding_window": 13, "use_sliding_window": True, "max_window_layers": 1},
    ),
    # With two experts a token one choice hangs on the last bits.
    "mixtral": ("mixtral", {"num_experts_per_tok": 3}),
    "glm4 with experts": ("glm4_moe", {}),
}


def probes() -> list:
    common = {"max_new_tokens": 40}
    return [
        *[request(f"group-{i}", PROMPT, seed=i, group="g", **common) for i in range(6)],
        request("greedy", PROMPT[:31], temperature=0.0, **common),
        request("short", PROMPT[:3], seed=8, **common),
        request("branch", [*PROMPT[:40], 7, 8, 9], seed=9, **common),
    ]


def run(folder: Path, **options: Any) -> dict[str, Any]:
    with make_replica(folder, **options) as replica:
        replica.submit(probes())
        return drain(replica)


def assert_exact(model: Any, outputs: dict[str, Any], atol: float = 1e-4) -> None:
    for probe in probes():
        output = outputs[probe.rid]
        want = exact_logprobs(model, probe.prompt_ids.tolist(), output.token_ids.tolist())
        np.testing.assert_allclose(output.logprobs, want, atol=atol, err_msg=probe.rid)


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = FAMILIES[name]
    model = write_tiny(tmp_path, family, **overrides)
    assert_exact(model, run(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_do_not_depend_on_how_it_was_scheduled(name: str, tmp_path: Path) -> None:
    family, overrides = FAMILIES[name]
    write_tiny(tmp_path, family, **overrides)
    outputs = run(tmp_path)
    plain = run(tmp_path, prefix_cache=False, max_chunk_tokens=16, max_step_tokens=48)
    for rid, want in outputs.items():
        assert plain[rid].token_ids.tolist() == want.token_ids.tolist(), rid
        np.testing.assert_allclose(plain[rid].logprobs, want.logprobs, atol=1e-4, err_msg=rid)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefix_that_is_cached_is_the_prefix(name: str, tmp_path: Path) -> None:
    family, overrides = FAMILIES[name]
    model = write_tiny(tmp_path, family, **overrides)
    with make_replica(tmp_path) as replica:
        replica.submit([request("first", PROMPT, seed=1, max_new_tokens=30)])
        first = drain(replica)["first"]
        again = [*PROMPT, *first.token_ids.tolist(), 3, 4]
        replica.submit([request("second", again, seed=2, max_new_tokens=20)])
        second = drain(replica)["second"]
    assert second.cached_tokens >= len(PROMPT)
    want = exact_logprobs(model, again, second.token_ids.tolist())
    np.testing.assert_allclose(second.logprobs, want, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_updated_in_place(name: str, tmp_path: Path) -> None:
    family, overrides = FAMILIES[name]
    write_tiny(tmp_path, family, **overrides)
    new = tiny_hf(family, seed=1, **overrides)
    with make_replica(tmp_path) as replica:
        push(new, 1, replica)
        replica.submit(probes())
        outputs = drain(replica)
    assert_exact(new, outputs)


@pytest.mark.parametrize("name", ["olmo2", "smollm3", "gemma3"])
def test_bfloat16_logprobs_are_close_to_float32(name: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path, name)
    outputs = run(tmp_path, dtype="bfloat16")
    for rid in ("group-0", "greedy"):
        output = outputs[rid]
        prompt = PROMPT if rid == "group-0" else PROMPT[:31]
        want = exact_logprobs(model, prompt, output.token_ids.tolist())
        np.testing.assert_allclose(output.logprobs, want, atol=0.3, err_msg=rid)
        assert np.abs(output.logprobs - want).mean() < 0.05
