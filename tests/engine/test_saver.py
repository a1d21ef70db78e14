"""Giving the memory of live tensors back: storages on a CPU, mapped memory on a GPU."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager, nullcontext
from types import ModuleType

import pytest
import torch

from engine.errors import UnsupportedOption
from engine.saver import PlainSaver, TorchMemorySaver, build_saver

MODULE = "torch_memory_saver.entrypoint"


def test_plain_storages_go_and_come_back_under_their_views() -> None:
    saver = build_saver(torch.device("cpu"))
    assert isinstance(saver, PlainSaver)
    whole = torch.arange(12.0)
    tail, other = whole[8:], torch.ones(3)
    saver.release("kv_cache", [whole, tail, other])
    assert whole.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    saver.resume("kv_cache")
    assert whole.untyped_storage().nbytes() == 48
    whole.zero_()
    assert tail.tolist() == [0.0] * 4, "a view sees what is written to its base"


class FakeLibrary:
    """Records what is asked of torch-memory-saver."""

    calls: list[tuple[str, str]]

    def __init__(self) -> None:
        self.hook_mode = "preload"
        self.calls = []

    @contextmanager
    def region(self, tag: str):
        self.calls.append(("region", tag))
        yield

    def pause(self, tag: str) -> None:
        self.calls.append(("pause", tag))

    def resume(self, tag: str) -> None:
        self.calls.append(("resume", tag))

    @staticmethod
    def closed(library: FakeLibrary) -> list[str]:
        """Tags that were paused, without the prefix, sorted."""
        return sorted(tag.rpartition("-")[2] for name, tag in library.calls if name == "pause")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type[FakeLibrary]:
    module = ModuleType(MODULE)
    module.TorchMemorySaver = FakeLibrary  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_memory_saver", ModuleType("torch_memory_saver"))
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    return FakeLibrary


def test_two_engines_of_a_process_have_tags_of_their_own(library) -> None:
    savers = [TorchMemorySaver(torch.device("cuda")) for _ in range(2)]
    for saver in savers:
        with saver.region("weights"):
            pass
        saver.release("weights", [])
    calls = [saver._library.calls for saver in savers]
    assert [[name for name, _ in found] for found in calls] == [["region", "pause"]] * 2
    assert calls[0][1][1] == calls[0][0][1] != calls[1][0][1]
    assert all(saver._library.hook_mode == "torch" for saver in savers)


def test_an_engine_that_goes_gives_back_what_is_not_released_already(library) -> None:
    saver = TorchMemorySaver(torch.device("cuda"))
    found = saver._library
    for tag in ("weights", "kv_cache"):
        with saver.region(tag):
            pass
    saver.release("weights", [])
    del saver
    gc.collect()
    assert library.closed(found) == ["kv_cache", "weights"]


def test_closing_twice_gives_back_once(library) -> None:
    saver = TorchMemorySaver(torch.device("cuda"))
    with saver.region("kv_cache"):
        pass
    saver.close()
    saver.close()
    assert library.closed(saver._library) == ["kv_cache"]


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    with pytest.raises(UnsupportedOption, match=r"pip install -e '\.\[gpu\]'") as refusal:
        TorchMemorySaver(torch.device("cuda"))
    assert refusal.value.field == "memory.saver"


def test_expandable_segments_are_refused(library, monkeypatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(UnsupportedOption, match="PYTORCH_CUDA_ALLOC_CONF"):
        TorchMemorySaver(torch.device("cuda"))


GIB = 1 << 30


@pytest.mark.gpu
def test_gpu_memory_goes_and_comes_back_at_the_same_address() -> None:
    saver, device = TorchMemorySaver(torch.device("cuda")), torch.device("cuda")
    with saver.region("weights", num_bytes=GIB + (64 << 20)):
        parts = [torch.full((GIB // 8,), i, dtype=torch.uint8, device=device) for i in range(8)]
    addresses = [part.data_ptr() for part in parts]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    saver.release("weights", parts)
    assert torch.cuda.mem_get_info()[0] - before >= GIB
    saver.resume("weights")
    for part in parts:
        part.fill_(7)
    assert [part.data_ptr() for part in parts] == addresses
    assert all(bool((part == 7).all()) for part in parts)


@pytest.mark.gpu
def test_a_graph_replays_after_its_memory_came_back() -> None:
    saver = TorchMemorySaver(torch.device("cuda"))
    static = torch.arange(1 << 20, dtype=torch.float32, device="cuda")
    result = torch.zeros_like(static)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def work() -> None:
        wide = static.repeat(64).view(64, -1)
        result.copy_((wide * 2).sum(0))

    stream.wait_stream(torch.cuda.current_stream())
    with saver.region("cuda_graph"), torch.cuda.stream(stream):
        work()
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        work()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    expected = result.clone()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    saver.release("cuda_graph", [])
    assert torch.cuda.mem_get_info()[0] - before >= 256 << 20, "the graph's memory did not go"
    saver.resume("cuda_graph")
    result.zero_()
    graph.replay()
    assert torch.equal(result, expected)
