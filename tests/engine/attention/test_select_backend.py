"""Which back end is taken, with what reason, and what refusals say."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from engine.attention import select as module
from engine.attention.base import CapturableBackend
from engine.attention.select import flashinfer_refusal, select
from engine.errors import InvalidRequest
from engine.kv.pool import KVPool
from tests.helpers.head_pools import head_pool


def make_pool(
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    windows: tuple[int | None, ...] = (None,),
    *,
    scaled: bool = False,
) -> KVPool:
    return head_pool(
        num_layers=len(windows),
        num_pages=2,
        page_size=16,
        num_kv_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        windows=windows,
        scaled=scaled,
    )


def choose(name: str, device: str, pool: KVPool | None = None):
    return select(name, pool or make_pool(), num_heads=4, scale=0.1, device=torch.device(device))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer as far as a constructor can tell."""
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace())
    monkeypatch.setattr(module, "flashinfer_installed", lambda: True)
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    monkeypatch.setattr(module, "is_prefill_compiled", lambda dtype, head_dim: True)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "flashinfer_installed", lambda: False)


def test_a_cpu_takes_torch() -> None:
    choice = choose("auto", "cpu")
    assert (choice.backend.name, choice.reason) == ("torch_native", "auto: cpu device")


def test_a_gpu_without_flashinfer_takes_triton_and_says_why(missing: None) -> None:
    choice = choose("auto", "cuda")
    assert choice.backend.name == "triton"
    assert "not installed" in choice.reason


def test_a_gpu_with_flashinfer_takes_prefill_from_it(installed: None) -> None:
    choice = choose("auto", "cuda")
    assert choice.backend.name == "flashinfer+triton"
    assert "FlashInfer" in choice.reason
    assert isinstance(choice.backend, CapturableBackend)


def test_kernels_that_would_have_to_be_compiled_are_left_until_asked_for(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[torch.dtype, int]] = []

    def compiled(dtype: torch.dtype, head_dim: int) -> bool:
        asked.append((dtype, head_dim))
        return False

    monkeypatch.setattr(module, "is_prefill_compiled", compiled)
    choice = choose("auto", "cuda", make_pool(head_dim=64))
    assert choice.backend.name == "triton"
    assert "attention='split' compiles them" in choice.reason
    assert asked == [(torch.bfloat16, 64)]
    assert choose("split", "cuda").backend.name == "flashinfer+triton"


def test_another_gpu_keeps_prefill_batch_invariant(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_hopper", lambda device: False)
    choice = choose("auto", "cuda")
    assert choice.backend.name == "triton"
    assert "Hopper" in choice.reason


@pytest.mark.parametrize(
    ("pool", "cause"),
    [(make_pool(torch.float32), "float32"), (make_pool(head_dim=80), "heads of 80")],
)
def test_a_model_flashinfer_lacks_takes_triton(installed: None, pool: KVPool, cause: str) -> None:
    choice = choose("auto", "cuda", pool)
    assert choice.backend.name == "triton"
    assert cause in choice.reason
    with pytest.raises(InvalidRequest, match=cause) as raised:
        choose("flashinfer", "cuda", pool)
    assert raised.value.field == "attention"


@pytest.mark.parametrize("name", ["flashinfer", "split"])
def test_a_missing_package_is_named(missing: None, name: str) -> None:
    with pytest.raises(InvalidRequest, match="pip install flashinfer-python") as raised:
        choose(name, "cuda")
    assert raised.value.field == "attention"


@pytest.mark.parametrize("name", ["triton", "flashinfer", "split"])
def test_gpu_back_ends_refuse_a_cpu(installed: None, name: str) -> None:
    with pytest.raises(InvalidRequest, match="needs a GPU"):
        choose(name, "cpu")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torch_native", "torch_native"),
        ("triton", "triton"),
        ("flashinfer", "flashinfer"),
        ("split", "flashinfer+triton"),
    ],
)
def test_what_is_asked_for_is_taken(installed: None, name: str, found: str) -> None:
    choice = choose(name, "cuda")
    assert (choice.backend.name, choice.reason) == (found, "asked for")


def test_the_captured_back_ends_are_capturable(installed: None) -> None:
    assert isinstance(choose("flashinfer", "cuda").backend, CapturableBackend)
    assert not isinstance(choose("torch_native", "cuda").backend, CapturableBackend)


def test_windows_of_layers_leave_triton(installed: None) -> None:
    pool = make_pool(windows=(64, None))
    choice = choose("auto", "cuda", pool)
    assert choice.backend.name == "triton"
    assert "sliding windows" in choice.reason
    for name in ("flashinfer", "split"):
        with pytest.raises(InvalidRequest, match="sliding windows") as caught:
            choose(name, "cuda", pool)
        assert caught.value.field == "attention"


def test_refusals() -> None:
    assert flashinfer_refusal("cuda", torch.bfloat16, 64, installed=True) == ""
    assert "GPU" in flashinfer_refusal("cpu", torch.bfloat16, 64, installed=True)


def test_fp8_kv_takes_triton_and_flashinfer_is_refused(installed: None) -> None:
    pool = make_pool(scaled=True)
    choice = choose("auto", "cuda", pool)
    assert choice.backend.name == "triton"
    assert "fp8_e4m3" in choice.reason
    for name in ("flashinfer", "split"):
        with pytest.raises(InvalidRequest, match="fp8_e4m3") as caught:
            choose(name, "cuda", pool)
        assert caught.value.field == "attention"
    assert choose("auto", "cpu", pool).backend.name == "torch_native"
