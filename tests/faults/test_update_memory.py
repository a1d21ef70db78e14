"""Updates half of which fail: memory stays flat, and the text that is served is of one version."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.protocol import BeginUpdate
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.helpers.weight_engines import Tensors, specs

SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 4000}
MODES = ("shadow", "undo")
WARM_UP = 8
LARGEST_GROWTH = 0.01


def resident_bytes() -> int:
    """Of this process, once freed memory went back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def answers(replica: InlineReplica) -> tuple[list[int], list[float]]:
    """Greedy tokens and their logprobs."""
    replica.submit([request("r", [1, 2, 3, 4], temperature=0.0, ignore_eos=True, max_new_tokens=5)])
    output = drain(replica)["r"]
    return np.asarray(output.token_ids).tolist(), np.asarray(output.logprobs).tolist()


def failing(new: Tensors, index: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A source that dies, or brings NaN, somewhere else each time."""
    items = list(new.items())
    stop = index % len(items)
    for position, (name, tensor) in enumerate(items):
        if position == stop and index % 3:
            raise (RuntimeError("injected"), torch.OutOfMemoryError("injected"))[index % 2]
        if position == stop:
            tensor = tensor.clone()
            tensor.view(-1)[-1] = torch.nan
        yield name, tensor


def update(replica: InlineReplica, new: Tensors, index: int, version: int) -> bool:
    """One update, every second of which fails; whether it was committed."""
    begin = BeginUpdate(version=version, manifest=specs(new), mode=MODES[index // 2 % 2])
    if index % 2 == 0:
        replica.update_weights_inproc(begin, new.items())
        return True
    with pytest.raises(Exception, match=r"injected|NaN|no memory"):
        replica.update_weights_inproc(begin, failing(new, index))
    return False


def grown_by(folder: Path, count: int) -> tuple[int, int]:
    """Bytes that `count` updates leave behind, and those there were before them."""
    models = [tiny_hf("llama", seed=seed, **SIZES) for seed in (1, 2)]
    weights = [{n: p.detach() for n, p in model.named_parameters()} for model in models]
    with make_replica(folder, num_pages=60, prefix_cache=False) as replica:
        served: dict[int, tuple[list[int], list[float]]] = {}
        before, base = answers(replica), 0
        for index in range(WARM_UP + count):
            which = index // 2 % 2
            if update(replica, weights[which], index, version=index + 1):
                before = answers(replica)
                assert served.setdefault(which, before) == before, "bit for bit"
            assert answers(replica) == before, "a failed update changes nothing"
            if index == WARM_UP:
                base = resident_bytes()
        assert len(served) == 2 and served[0] != served[1]
        return resident_bytes() - base, base


@pytest.mark.parametrize(
    "count",
    [pytest.param(20, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.long)],
)
def test_every_second_update_fails(tmp_path: Path, count: int) -> None:
    """In a process of its own: what threads of other tests take is not an update's."""
    write_tiny(tmp_path, "llama", **SIZES)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        grown, base = alone.submit(grown_by, tmp_path, count).result(500)
    assert grown <= LARGEST_GROWTH * base, f"{grown} bytes more than {base}"
