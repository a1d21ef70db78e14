"""float16 through the whole engine on a CPU against transformers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import InvalidRequest
from engine.protocol import RequestOutput
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.rounding import stored_logprob_bound
from tests.helpers.tiny_models import tiny_hf, write_tiny, write_tiny_gguf
from trainer_bridge import push

PROMPT = list(range(5, 60))
FAMILIES = ["llama", "qwen2", "qwen3", "olmo2", "smollm3", "mistral"]
UNIT_ROUNDOFF = 2.0**-11


def run(replica: InlineReplica) -> dict[str, RequestOutput]:
    common = {"max_new_tokens": 20}
    replica.submit(
        [
            *[request(f"group-{i}", PROMPT, seed=i, group="g", **common) for i in range(2)],
            request("greedy", PROMPT, temperature=0.0, **common),
        ]
    )
    return drain(replica)


def largest_difference(model: Any, outputs: dict[str, RequestOutput]) -> float:
    return max(
        float(np.abs(o.logprobs - exact_logprobs(model, PROMPT, o.token_ids.tolist())).max())
        for o in outputs.values()
    )


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])]
)
def test_logprobs_are_those_of_transformers_in_float16(family: str, tmp_path: Path) -> None:
    """Within what float16 rounds, which bfloat16 exceeds; and the same after an update."""
    model = write_tiny(tmp_path, family)
    bound = stored_logprob_bound(model.config, UNIT_ROUNDOFF)
    with make_replica(tmp_path, dtype="float16") as replica:
        assert replica.state().dtype == "float16"
        outputs = run(replica)
        new = tiny_hf(family, seed=1)
        push(new, 1, replica)
        updated = run(replica)
    assert largest_difference(model.half(), outputs) < bound
    assert largest_difference(new.half(), updated) < bound
    with make_replica(tmp_path, dtype="bfloat16") as replica:
        assert largest_difference(model.float(), run(replica)) > bound


@pytest.mark.parametrize("sent", [torch.float16, torch.bfloat16, torch.float32])
def test_trainers_of_every_dtype_push_into_float16(sent: torch.dtype, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    new = tiny_hf("llama", seed=1).to(sent)
    with make_replica(tmp_path, dtype="float16") as replica:
        push(new, 1, replica)
        outputs = run(replica)
    bound = stored_logprob_bound(new.config, UNIT_ROUNDOFF)
    assert largest_difference(new.half(), outputs) < bound
    assert outputs["greedy"].spans[0].version == 1


@pytest.mark.slow
def test_a_quantised_file_is_served_in_float16(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = write_tiny_gguf(path, quant="Q8_0")
    with make_replica(path, dtype="float16") as replica:
        difference = largest_difference(model.half(), run(replica))
    assert difference < stored_logprob_bound(model.config, UNIT_ROUNDOFF)


def test_gemma_3_is_refused_by_name_and_reason(tmp_path: Path) -> None:
    write_tiny(tmp_path, "gemma3")
    with pytest.raises(InvalidRequest, match=r"Gemma3.*float16.*65504.*bfloat16") as refusal:
        make_replica(tmp_path, dtype="float16")
    assert refusal.value.field == "dtype"


def test_an_activation_beyond_float16_ends_its_sequences_with_an_error_that_says_so(
    tmp_path: Path,
) -> None:
    """Weights that fit, and a residual stream that does not."""
    model = write_tiny(tmp_path)
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        mlp.down_proj.weight *= 5e4 / mlp.down_proj.weight.abs().max()
        mlp.up_proj.weight *= 20
    model.save_pretrained(tmp_path)
    for dtype in ("bfloat16", "float16"):
        with make_replica(tmp_path, dtype=dtype) as replica:
            outputs = run(replica)
        for output in outputs.values():
            assert output.finish is not None
            if dtype == "bfloat16":
                assert output.finish.error is None and np.isfinite(output.logprobs).all()
            else:
                assert output.finish.error == "NonFiniteLogits"
                assert "float16" in (output.finish.message or "")
