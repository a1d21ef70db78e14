"""A reference whose weights are where it computes only while it does."""

from __future__ import annotations

import pytest
import torch

from recipes.trainers.reference import HostReference, reference_of
from tests.helpers.tiny_models import tiny_hf

IDS = torch.tensor([[1, 2, 3]])


def test_it_computes_elsewhere_and_stays_in_host_memory() -> None:
    """The device that holds no numbers stands for any other one."""
    elsewhere = torch.device("meta")
    model = tiny_hf("llama")
    before = [(p, p.data_ptr()) for p in model.parameters()]
    reference = reference_of(model, elsewhere, on_host=True)
    for _ in range(2):
        with reference as entered:
            assert entered.device == elsewhere
            assert entered(input_ids=IDS.to(elsewhere)).logits.device == elsewhere
        for parameter, at in before:
            assert parameter.device.type == "cpu" and parameter.data_ptr() == at
        with pytest.raises(AssertionError, match="in host memory"):
            reference(input_ids=IDS)  # type: ignore[operator]


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    reference = HostReference(tiny_hf("llama"), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="broke"), reference:
        raise RuntimeError("it broke")
    assert not reference._moved


def test_a_copy_is_the_model_itself() -> None:
    model = tiny_hf("llama")
    with reference_of(model, torch.device("cpu"), on_host=False) as entered:
        assert entered is model
