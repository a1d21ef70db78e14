"""The programs of docs/examples on the default model."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from engine.config import CacheConfig, EngineConfig
from rollout.launch import launch
from rollout.program import Runner
from rollout.replica.inline import InlineReplica

EXAMPLES = Path(__file__).resolve().parents[3] / "docs" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def replica(default_model: str) -> Iterator[InlineReplica]:
    config = EngineConfig(
        model=default_model,
        device="cpu",
        context_length=1024,
        cache=CacheConfig(memory_bytes=1 << 28),
    )
    with launch(config) as found:
        assert isinstance(found, InlineReplica)
        yield found


@pytest.mark.slow
def test_best_of_n(replica: InlineReplica) -> None:
    runner = Runner.of_replica(replica, seed=1)
    answer, margin = runner.run(
        example("best_of_n").best_of_n, "What is the capital of France?", count=3
    )
    assert answer and isinstance(margin, float)


@pytest.mark.slow
def test_tree_of_thought(replica: InlineReplica) -> None:
    program = example("tree_of_thought").tree_of_thought
    steps = Runner.of_replica(replica).run(program, "What is 3 times 4?", width=2, keep=1)
    assert len(steps) == 2 and all(steps)


@pytest.mark.slow
def test_tool_loop(replica: InlineReplica) -> None:
    found = Runner.of_replica(replica).run(example("tool_loop").shop, "How many apples?")
    assert [call.name for call in found.calls][:1] == ["stock"]
    assert found.calls[0].result in ("12", "0") or found.calls[0].result.startswith("error: there")
    assert found.text
