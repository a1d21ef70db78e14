"""Options that cannot be honoured are refused by name before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engine.worker
from engine.config import EngineConfig, SpeculativeConfig
from engine.errors import InvalidRequest, UnsupportedOption
from engine.memory import StepSizes, step_bytes
from engine.speculative.checks import check_attention, max_verified
from rollout.launch import launch
from tests.helpers.tiny_models import write_tiny

REFUSED = [
    ({"method": "eagle3"}, UnsupportedOption, "speculative", "'eagle3' are not built"),
    ({"method": "draft"}, UnsupportedOption, "speculative", "'draft' are not built"),
    ({"method": "ngram", "draft_tokens": 8}, InvalidRequest, "draft_tokens", "from 1 to 7"),
    ({"method": "ngram", "draft_tokens": 0}, InvalidRequest, "draft_tokens", "from 1 to 7"),
    ({"draft_tokens": -1}, InvalidRequest, "draft_tokens", "from 1 to 7"),
    ({"allow_forced_acceptance": True}, InvalidRequest, "allow_forced_acceptance", "--speculative"),
]


def refusal(model: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> InvalidRequest:
    """What an engine over `model` says at its start."""
    monkeypatch.delattr(engine.worker, "load_initial")
    with pytest.raises(InvalidRequest) as caught:
        launch(EngineConfig(model=str(model), device="cpu", dtype="float32", **options))
    return caught.value


@pytest.mark.parametrize(("options", "kind", "field", "says"), REFUSED)
def test_what_cannot_be_honoured_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    kind: type[InvalidRequest],
    field: str,
    says: str,
) -> None:
    write_tiny(tmp_path, "llama")
    error = refusal(tmp_path, monkeypatch, speculative=SpeculativeConfig(**options))
    assert (type(error), error.field) == (kind, field)
    assert says in error.message


@pytest.mark.parametrize("method", ["ngram", "auto"])
def test_a_classifier_drafts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    write_tiny(tmp_path, "llama", classifier=True)
    error = refusal(tmp_path, monkeypatch, speculative=SpeculativeConfig(method=method))
    assert (type(error), error.field) == (UnsupportedOption, "speculative")


def test_equal_bits_for_every_batch_are_not_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path, "llama")
    error = refusal(tmp_path, monkeypatch, numerics="invariant")
    assert (type(error), error.field) == (UnsupportedOption, "numerics")


def test_a_back_end_that_plans_on_the_host_serves_no_drafts() -> None:
    with pytest.raises(UnsupportedOption) as caught:
        check_attention("flashinfer")
    assert caught.value.field == "attention"
    for name in ("torch_native", "triton", "split"):
        check_attention(name)


def test_a_verifying_step_has_as_many_rows_as_fit() -> None:
    def most(**options: Any) -> int:
        return max_verified(EngineConfig(model="m", speculative=SpeculativeConfig(**options)))

    assert most() == 256
    assert most(method="ngram", draft_tokens=1) == 512
    assert most(method="ngram", draft_tokens=7) == 512


def test_memory_is_kept_free_for_the_logits_of_drafts() -> None:
    def kept(**options: Any) -> int:
        config = EngineConfig(model="m", speculative=SpeculativeConfig(**options))
        return step_bytes(
            config.scheduler,
            max_verified(config),
            StepSizes(hidden_size=64, intermediate_size=128, outputs=1000),
        )

    assert kept(method="ngram") - kept() == 3 * 4 * (512 - 256) * 1000
