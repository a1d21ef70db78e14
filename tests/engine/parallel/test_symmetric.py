"""Collectives by mapped memory: what goes which way, what happens where there is no such memory,
and how they end. The kernels themselves: `tests/kernels/collectives`."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from engine.errors import EngineDead
from engine.parallel import symmetric
from engine.parallel.collectives import Collectives, NoCollectives
from engine.parallel.mesh import Mesh
from engine.parallel.process_group import meeting_point
from engine.parallel.routes import Routes
from engine.parallel.symmetric import SymmetricCollectives, map_or_not
from kernels.torch_compat import HashStore, PrefixStore
from tests.helpers.thread_ranks import with_collectives

SMALL = Routes(one_shot=64, two_shot=128, normed=64, gather=64, scatter=64)


class Rest:
    """Stands for NCCL: says what it was asked."""

    description = "NCCL"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            return args[0] if args else None

        return call


class Box:
    size = 2


class FakeMapping:
    """Mapped memory that notes what becomes of it."""

    def __init__(self, *_: Any) -> None:
        self.mailbox = Box()
        self.events: list[str] = []

    def give_up(self) -> None:
        self.events.append("give up")

    def close(self) -> None:
        self.events.append("close")


class Norm:
    """Adds, and normalises nothing."""

    weight, eps, weighting = torch.ones(4), 1e-5, "rounded"

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + residual, x + residual


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were called, in place of calling them."""
    calls: list[str] = []

    def stub(name: str) -> Callable[..., Any]:
        def call(x: torch.Tensor, *_: Any, shots: int = 0, **__: Any) -> Any:
            calls.append(f"{name} {shots}" if shots else name)
            return (x, x) if name == "all_reduce_add_rms_norm" else x

        return call

    for name in (
        "all_reduce",
        "all_gather_rows",
        "reduce_scatter_rows",
        "all_reduce_add_rms_norm",
    ):
        monkeypatch.setattr(symmetric.ops, name, stub(name))
    monkeypatch.setattr(symmetric, "routes_of", lambda size: SMALL)
    monkeypatch.setattr(
        symmetric.ops, "can_send", lambda x: x.is_floating_point() and x.nbytes % 4 == 0
    )
    return calls


def test_sizes_go_the_way_of_the_table(sent: list[str]) -> None:
    rest = Rest()
    group = SymmetricCollectives(FakeMapping(), rest)
    for numbers in (16, 17, 32, 33):
        group.all_reduce(torch.ones(numbers))
    assert sent == ["all_reduce 1", "all_reduce 2", "all_reduce 2"]
    assert rest.calls == ["all_reduce"]
    sent.clear()
    group.all_gather_rows(torch.ones(4, 4))
    group.reduce_scatter_rows(torch.ones(8, 4))
    assert sent == ["all_gather_rows", "reduce_scatter_rows"]
    group.all_gather_rows(torch.ones(5, 4))
    group.reduce_scatter_rows(torch.ones(10, 4))
    assert rest.calls == ["all_reduce", "all_gather_rows", "reduce_scatter_rows"]


def test_what_the_kernels_do_not_take_goes_by_nccl(sent: list[str]) -> None:
    rest = Rest()
    group = SymmetricCollectives(FakeMapping(), rest)
    group.all_reduce(torch.ones(4, dtype=torch.int32))
    group.all_gather_rows(torch.ones(3, 1, dtype=torch.bfloat16))
    group.reduce_scatter_rows(torch.ones(2, 3, dtype=torch.bfloat16))
    assert not sent
    assert rest.calls == ["all_reduce", "all_gather_rows", "reduce_scatter_rows"]


def test_a_norm_is_fused_for_few_rows_only(sent: list[str]) -> None:
    group = SymmetricCollectives(FakeMapping(), Rest())
    group.all_reduce_add_norm(torch.ones(4, 4), torch.ones(4, 4), Norm())
    assert sent == ["all_reduce_add_rms_norm"]
    sent.clear()
    _, total = group.all_reduce_add_norm(torch.ones(5, 4), torch.ones(5, 4), Norm())
    assert sent == ["all_reduce 2"]
    assert total.tolist() == [[2.0] * 4] * 5
    sent.clear()
    strided = torch.ones(4, 8)[:, :4]
    group.all_reduce_add_norm(torch.ones(4, 4), strided, Norm())
    assert sent == ["all_reduce 1"]


def test_given_up_it_ends_waits_and_refuses_more(sent: list[str]) -> None:
    mapping, rest = FakeMapping(), Rest()
    group = SymmetricCollectives(mapping, rest)
    group.abort()
    assert mapping.events == ["give up"]
    assert rest.calls == ["abort"]
    with pytest.raises(EngineDead, match="given up"):
        group.all_reduce(torch.ones(4))
    assert not sent
    group.close()
    assert mapping.events == ["give up", "give up", "close"]


def test_closing_ends_waits_before_it_unmaps() -> None:
    mapping, rest = FakeMapping(), Rest()
    group = SymmetricCollectives(mapping, rest)
    group.close()
    group.close()
    assert mapping.events == ["give up", "close"]
    assert rest.calls == ["close", "close"]


def test_closed_it_keeps_no_memory() -> None:
    mapping = FakeMapping()
    group = SymmetricCollectives(mapping, Rest())
    seen = weakref.ref(mapping)
    del mapping
    group.close()
    gc.collect()
    assert seen() is None


def test_memory_of_a_device_in_error_stays_mapped() -> None:
    """torch would end the process over it."""
    mapping = FakeMapping()
    mapping.close = Mock(side_effect=RuntimeError("an illegal memory access"))
    rest = Rest()
    group = SymmetricCollectives(mapping, rest)
    seen = weakref.ref(mapping)
    del mapping
    group.close()
    gc.collect()
    assert seen() is not None
    assert rest.calls == ["close"]


def mapped_on(
    size: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **broken: tuple[int, ...]
) -> list[tuple[type, str]]:
    """What ranks get whose allocation, or mapping, fails on the ranks of `broken`."""

    def allocate(rank: int) -> torch.Tensor:
        if rank in broken.get("allocating", ()):
            raise RuntimeError("no such memory here\nC++ stack")
        return torch.zeros(1)

    def mapping(words: torch.Tensor, mesh: Mesh, store: Any) -> FakeMapping:
        if mesh.tp_rank in broken.get("mapping", ()):
            raise RuntimeError("a peer is out of reach")
        return FakeMapping()

    monkeypatch.setattr(symmetric, "symmetric_empty", lambda _, device: allocate(device.index))
    monkeypatch.setattr(symmetric, "Mapping", mapping)

    def run(mesh: Mesh, host: Collectives) -> tuple[type, str]:
        device = torch.device("cuda", mesh.tp_rank)
        found = map_or_not(Rest(), host, HashStore(), mesh, device)
        return type(found), found.description

    return with_collectives(size, run)


def test_every_rank_that_can_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = mapped_on(2, tmp_path, monkeypatch)
    assert found == [(SymmetricCollectives, "mapped memory of 2 GPUs")] * 2


@pytest.mark.parametrize("step", ["allocating", "mapping"])
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1, 2)])
def test_a_rank_without_mapped_memory_sends_all_by_nccl(
    ranks: tuple[int, ...],
    step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = mapped_on(3, tmp_path, monkeypatch, **{step: ranks})
    why = {"allocating": "no such memory here", "mapping": "a peer is out of reach"}[step]
    for rank, (kind, description) in enumerate(found):
        assert kind is Rest
        said = why if rank in ranks else "another rank has no mapped memory"
        assert description == f"NCCL ({said})"
        assert said in caplog.text


@pytest.mark.parametrize("before", [None, "0"])
def test_multicast_is_off_while_memory_is_mapped_only(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer in the same process may use it."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    seen: list[str | None] = []

    class Seen(FakeMapping):
        def __init__(self, *_: Any) -> None:
            super().__init__()
            seen.append(os.environ.get(name))

    monkeypatch.setattr(symmetric, "symmetric_empty", lambda *_: torch.zeros(1))
    monkeypatch.setattr(symmetric, "Mapping", Seen)
    host = NoCollectives()
    map_or_not(Rest(), host, HashStore(), Mesh(tp_size=2), torch.device("cuda", 0))
    assert seen == ["1"]
    assert os.environ.get(name) == before


def test_on_a_machine_without_gpus_there_is_none(tmp_path: Path) -> None:
    """torch's own refusal, whatever it is, is one that is understood."""
    if torch.cuda.is_available():
        pytest.skip("has a GPU")

    def run(mesh: Mesh, host: Collectives) -> str:
        store = PrefixStore("x", meeting_point(str(tmp_path / "place"), mesh))
        return map_or_not(Rest(), host, store, mesh, torch.device("cuda", 0)).description

    assert all(text.startswith("NCCL (") for text in with_collectives(2, run))
