"""Several copies of a model in one replica: what they sample is what one rank samples, and every
command reaches all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest

from engine.config import (
    CacheConfig,
    EngineConfig,
    MemoryConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    SpeculativeMethod,
)
from engine.errors import GroupError, UnsupportedOption
from engine.protocol import (
    Abort,
    AbortUpdate,
    BeginUpdate,
    CheckWeights,
    CloseSession,
    CommitUpdate,
    FlushCache,
    JoinGroup,
    LoadFromDisk,
    OpenSession,
    Pause,
    ReleaseMemory,
    Request,
    RequestOutput,
    Resume,
    ResumeMemory,
    StagingMode,
)
from rollout.launch import launch
from rollout.replica.base import Replica
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.tiny_models import write_tiny
from tests.rollout.ranks.test_ranks import processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, "qwen2", tie_word_embeddings=True)
    return path


def copies_of(folder: Path, dp_size: int, tp_size: int, speculative: SpeculativeMethod) -> Replica:
    """A replica in as many processes."""
    return launch(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            device="cpu",
            cache=CacheConfig(num_pages=64, page_size=8),
            scheduler=SchedulerConfig(check_integrity=True, max_step_tokens=128),
            parallel=ParallelConfig(dp_size=dp_size, tp_size=tp_size, timeout_s=30.0),
            memory=MemoryConfig(saver=True, cpu_backup=True),
            speculative=SpeculativeConfig(method=speculative),
        )
    )


@pytest.fixture(
    scope="module", params=[(2, 1, "off"), (2, 2, "ngram")], ids=["dp2", "dp2-tp2-ngram"]
)
def replica(folder: Path, request: pytest.FixtureRequest) -> Iterator[Replica]:
    dp_size, tp_size, speculative = request.param
    with copies_of(folder, dp_size, tp_size, speculative) as replica:
        yield replica


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[Replica]:
    with make_replica(folder) as replica:
        yield replica


def mixed(num: int = 12) -> list[Request]:
    """Requests of several lengths, some sampled and some greedy, and a group of four."""
    found = [
        request(
            f"r{index}",
            [3 + (index * 7 + place) % 80 for place in range(3 + 5 * index % 40)],
            seed=index,
            temperature=float(index % 2),
            max_new_tokens=4 + index,
            ignore_eos=True,
        )
        for index in range(num)
    ]
    found += [
        request(
            f"g{sample}",
            range(5, 40),
            seed=100 + sample,
            group="g",
            temperature=1.0,
            max_new_tokens=8,
            ignore_eos=True,
        )
        for sample in range(4)
    ]
    return found


def tokens(outputs: dict[str, RequestOutput]) -> dict[str, list[int]]:
    return {rid: output.token_ids.tolist() for rid, output in outputs.items()}


def run(replica: Replica, requests: list[Request]) -> dict[str, list[int]]:
    replica.submit(requests)
    return tokens(drain(replica))


def test_copies_sample_what_one_rank_samples(replica: Replica, one: Replica) -> None:
    replica.send(FlushCache())
    assert run(replica, mixed()) == run(one, mixed())
    # Again, with prefixes that are cached now.
    assert run(replica, mixed()) == run(one, mixed())
    state = replica.state()
    assert state.dp_size == 2 and state.num_cached_tokens > 0
    assert state.total_pages == 2 * 64


def test_one_request_is_a_step_of_every_copy(replica: Replica, one: Replica) -> None:
    alone = [request("a", [5, 6, 7, 8], max_new_tokens=12, temperature=0.0, ignore_eos=True)]
    assert run(replica, alone) == run(one, alone)


def test_pauses_and_aborts_reach_every_copy(replica: Replica, one: Replica) -> None:
    expected = run(one, mixed())
    for mode in ("keep", "retract"):
        replica.submit(mixed())
        finals: dict[str, RequestOutput] = {}
        for _ in range(4):
            finals |= {o.rid: o for o in replica.step() if o.finish is not None}
        replica.send(Pause(mode=mode))
        finals |= {o.rid: o for o in replica.step() if o.finish is not None}
        assert replica.state().num_running + replica.state().num_waiting > 0
        assert replica.step() == []
        replica.send(Resume())
        finals |= drain(replica)
        assert tokens(finals) == expected, mode
    replica.submit(mixed())
    for _ in range(3):
        replica.step()
    replica.send(Pause(mode="abort"))
    ended = replica.step()
    assert {output.finish.type for output in ended if output.finish} == {"abort"}
    assert replica.idle()
    replica.send(Resume())
    replica.submit(mixed())
    replica.step()
    replica.send(Abort(rid_prefix="g"))
    finals = drain(replica)
    assert {finals[f"g{i}"].finish.type for i in range(4)} == {"abort"}
    assert finals["r3"].token_ids.tolist() == expected["r3"]


def test_masked_rows_of_any_copy_get_their_masks(replica: Replica, one: Replica) -> None:
    requests = [
        msgspec.structs.replace(each, allowed_token_ids=np.arange(10, 30, dtype=np.int32))
        if index % 3 == 0
        else each
        for index, each in enumerate(mixed())
    ]
    found = run(replica, requests)
    assert found == run(one, requests)
    assert set(found["r0"]) | set(found["r3"]) <= set(range(10, 30))


def test_turns_of_a_session_go_where_its_kv_is(replica: Replica, one: Replica) -> None:
    turns: dict[str, list[list[int]]] = {}
    for engine in (replica, one):
        names = [f"s{index}" for index in range(4)]
        for name in names:
            engine.send(OpenSession(session=name))
        found = []
        for turn in range(3):
            requests = [
                msgspec.structs.replace(
                    request(
                        f"{name}-{turn}",
                        [7 + index, 8, turn + 3],
                        max_new_tokens=9,
                        temperature=0.0,
                        ignore_eos=True,
                    ),
                    session=name,
                )
                for index, name in enumerate(names)
            ]
            engine.submit(requests)
            outputs = drain(engine)
            found += [outputs[each.rid].token_ids.tolist() for each in requests]
            if turn:
                assert all(outputs[each.rid].cached_tokens >= 11 for each in requests)
        for name in names:
            engine.send(CloseSession(session=name))
        assert engine.state().held_pages == 0
        turns["replica" if engine is replica else "one"] = found
    assert turns["replica"] == turns["one"]


def test_memory_is_released_and_resumed_on_every_rank(replica: Replica, one: Replica) -> None:
    expected = run(one, mixed())
    replica.submit(mixed())
    finals: dict[str, RequestOutput] = {}
    for _ in range(3):
        finals |= {o.rid: o for o in replica.step() if o.finish is not None}
    released = replica.send(ReleaseMemory(pause="retract")).memory
    assert len(released) == replica.state().num_ranks
    assert replica.step() == [] and replica.state().num_running == 0
    assert len(replica.send(ResumeMemory()).memory) == len(released)
    replica.send(Resume())
    assert tokens(finals | drain(replica)) == expected


def test_a_trainer_that_counts_the_ranks_of_one_copy_is_refused_at_once(replica: Replica) -> None:
    state = replica.state()
    join = JoinGroup(
        name="g", address="127.0.0.1", port=9, rank_offset=1, world_size=1 + state.tp_size
    )
    with pytest.raises(GroupError, match=f"this engine's {state.num_ranks} rank") as caught:
        replica.send(join)
    assert caught.value.field == "world_size"
    run(replica, mixed(2))


def test_experts_of_all_ranks_are_refused_by_name(folder: Path) -> None:
    config = EngineConfig(model=str(folder), device="cpu", parallel=ParallelConfig(ep=True))
    with pytest.raises(UnsupportedOption) as caught:
        launch(config)
    assert caught.value.field == "parallel.ep"


@pytest.mark.parametrize("num", [1, 8], ids=["no rows", "rows"])
def test_a_rank_that_dies_beside_another_of_its_copy_is_named(folder: Path, num: int) -> None:
    """Where its copy has rows, the other rank's collective fails first, and is not to blame."""
    with copies_of(folder, 2, 2, "off") as replica:
        replica.submit(
            [request(f"r{i}", [5 + i, 6], max_new_tokens=60, ignore_eos=True) for i in range(num)]
        )
        for _ in range(5):
            replica.step()
        process = processes(replica)[2]
        process.kill()
        process.wait()
        finals = drain(replica)
        assert {output.finish.error for output in finals.values()} == {"EngineDead"}
        message = finals["r0"].finish.message
        assert message.startswith("rank 3 (dp 1, tp 1) (process"), message


def updated_midway(replica: Replica, num: int, updates: list[tuple[StagingMode, Path]]) -> list:
    """Tokens and version spans of requests that meet each of the updates after a few steps, the
    first of them in a pause; a copy without any of them takes every update too."""
    replica.submit(
        [
            request(f"r{i}", [5 + i, 6, 7], max_new_tokens=24, temperature=0.0, ignore_eos=True)
            for i in range(num)
        ]
    )
    finals: dict[str, RequestOutput] = {}
    for version, (mode, path) in enumerate(updates, start=replica.state().version + 1):
        for _ in range(5):
            finals |= {o.rid: o for o in replica.step() if o.finish is not None}
        if mode == updates[0][0]:
            replica.send(Pause())
        replica.send(BeginUpdate(version=version, mode=mode))
        replica.send(LoadFromDisk(path=str(path)))
        replica.send(CommitUpdate(version=version))
        replica.send(Resume())
    finals |= drain(replica)
    # Raises where copies hold different weights.
    assert len(replica.send(CheckWeights()).weights) == replica.state().num_ranks
    return [
        (finals[f"r{i}"].token_ids.tolist(), [s.version for s in finals[f"r{i}"].spans])
        for i in range(num)
    ]


def test_updates_of_every_mode_reach_copies_with_rows_and_without(
    folder: Path, tmp_path: Path
) -> None:
    updates: list[tuple[StagingMode, Path]] = []
    for seed, mode in enumerate(get_args(StagingMode), start=1):
        write_tiny(tmp_path / mode, "qwen2", seed=seed, tie_word_embeddings=True)
        updates.append((mode, tmp_path / mode))
    with copies_of(folder, 2, 1, "off") as replica, make_replica(folder) as one:
        for num in (1, 6):
            found = updated_midway(replica, num, updates)
            assert found == updated_midway(one, num, updates)
            assert len(found[0][1]) == 1 + len(updates)
        # Aborted before it was committed: each copy serves what it served.
        replica.submit([request("a", [8, 9], max_new_tokens=20, temperature=0.0)])
        replica.step()
        replica.send(BeginUpdate(version=99, mode="undo"))
        replica.send(LoadFromDisk(path=str(updates[0][1])))
        replica.send(AbortUpdate(version=99))
        one.submit([request("a", [8, 9], max_new_tokens=20, temperature=0.0)])
        assert tokens(drain(replica)) == tokens(drain(one))
        replica.send(CheckWeights())
