"""What every test gets: GPU tests are skipped without one, torch errors are loud."""

from __future__ import annotations

import gc
import os
import zlib
from pathlib import Path

import hypothesis
import pytest

# How long an example takes depends on the machine and on what else it does.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# Few intra-op threads each: two torch processes with a thread a core on two cores stall.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
# More threads than cores, or a busy neighbour: a thread that spins at a barrier keeps the one it
# waits for from running.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One lost packet of a name server costs whoever forms a group a second, and not five.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PAGE = "plots.png"
DEFAULT_MODEL = (
    Path(__file__).resolve().parent.parent / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _take_share(config: pytest.Config, items: list[pytest.Item], share: str) -> None:
    """Of the long tests, keep part K of N, with `share` K/N; the same part in every process."""
    number, of = map(int, share.split("/"))
    others = [
        item
        for item in items
        if item.get_closest_marker("long") and zlib.crc32(item.nodeid.encode()) % of != number
    ]
    config.hook.pytest_deselected(items=others)
    dropped = set(others)
    items[:] = [item for item in items if item not in dropped]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests of the GPU where there is none (`make gpu-test` runs them where there is)."""
    if share := os.environ.get("TEST_SHARE"):
        _take_share(config, items, share)
    marked = [i for i in items if i.get_closest_marker("gpu") or i.get_closest_marker("multi_gpu")]
    if not marked:
        return
    num_gpus = _num_gpus()
    for item in marked:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if num_gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), found {num_gpus}"))


def pytest_collection_finish() -> None:
    """Modules and items, millions of objects, stay to the end: no collection of garbage need look
    through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def default_model() -> str:
    """Path of SmolLM2-135M-Instruct; `make setup` brings it."""
    if not DEFAULT_MODEL.exists():
        pytest.fail(f"{DEFAULT_MODEL} is missing; run `make setup`")
    return str(DEFAULT_MODEL)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave an empty picture of their curves: to draw it takes longer than a few steps of a
    tiny model, and has tests of its own."""
    monkeypatch.setattr("recipes.run.run_folder.draw_page", lambda folder: (folder / PAGE).touch())
