"""Steps that wait for masks on a GPU: a graph ends with their logits, and the draw comes later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from engine.protocol import Request
from rollout.launch import launch
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.gpu

PROMPT = list(range(5, 45))
ALLOWED = [3, 4, 17, 40, 41, 66, 90]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny-masked")
    return folder, write_tiny(folder, "qwen2", head_dim=64, max_position_embeddings=2048)


def masked(rid: str, *, allowed: list[int] | None = None, **fields: Any) -> Request:
    asked = request(rid, PROMPT, **{"max_new_tokens": 30, **fields})
    ids = np.array(allowed or ALLOWED, np.int32)
    return msgspec.structs.replace(asked, allowed_token_ids=ids)


def mixed(rows: int) -> list[Request]:
    """All begin and end in the same step, so that a bucket stays full."""
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.8}, {"min_p": 0.1}]
    found = []
    for row in range(rows):
        fields = {"seed": row, "max_new_tokens": 30, **kinds[row % len(kinds)]}
        plain = request(f"{row}", PROMPT, **fields)
        found.append(masked(f"{row}", **fields) if row % 3 else plain)
    return found


def outputs_of(folder: Path, requests: list[Request], **options: Any) -> dict[str, Any]:
    with make_replica(folder, device="cuda", **options) as replica:
        replica.submit(requests)
        found = drain(replica)
        worker = replica._leader._executor._worker
        if worker._graphs is not None:
            kinds = [kind for _, kind in worker._graphs._graphs]
            assert any(kind.options is None for kind in kinds), "no graph served a masked step"
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [2, 8, 64])
def test_a_full_bucket_is_bit_equal_to_eager(tiny: tuple[Path, Any], rows: int, dtype: str) -> None:
    options = {"dtype": dtype, "num_pages": 1500, "prefix_cache": False, "max_step_tokens": 4096}
    graphs = outputs_of(tiny[0], mixed(rows), **options)
    eager = outputs_of(tiny[0], mixed(rows), cuda_graphs=False, **options)
    for rid, want in eager.items():
        assert graphs[rid].token_ids.tolist() == want.token_ids.tolist(), rid
        np.testing.assert_array_equal(graphs[rid].logprobs, want.logprobs, err_msg=rid)


def test_padded_buckets_draw_what_is_allowed_by_the_models_law(tiny: tuple[Path, Any]) -> None:
    folder, model = tiny
    requests = [masked(f"{row}", seed=row, max_new_tokens=10 + 7 * row) for row in range(5)]
    requests.append(request("plain", PROMPT, seed=9, max_new_tokens=60))
    outputs = outputs_of(folder, requests, dtype="float32")
    for asked in requests:
        found = outputs[asked.rid]
        tokens = found.token_ids.tolist()
        if asked.masked:
            assert set(tokens) <= set(ALLOWED)
        want = exact_logprobs(model.cpu(), PROMPT, tokens)
        np.testing.assert_allclose(found.logprobs, want, atol=1e-3)


def test_more_rows_than_their_logits_are_kept_for_run_eagerly(
    tiny: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = outputs_of(tiny[0], mixed(8), dtype="float32")
    monkeypatch.setattr("engine.graphs._MOST_LOGIT_BYTES", 0)
    with make_replica(tiny[0], device="cuda", dtype="float32") as replica:
        replica.submit(mixed(8))
        found = drain(replica)
    for rid, want in few.items():
        assert found[rid].token_ids.tolist() == want.token_ids.tolist(), rid


def test_beside_drafts_tokens_are_those_of_plain_decoding(tiny: tuple[Path, Any]) -> None:
    asked = [masked(f"m{seed}", seed=seed, max_new_tokens=4) for seed in range(2)]
    long = {"temperature": 0.1, "max_new_tokens": 40}
    asked += [request(f"p{seed}", PROMPT, seed=seed, **long) for seed in range(3)]
    late = [masked(f"l{seed}", allowed=[9, 11], seed=seed, max_new_tokens=5) for seed in range(2)]
    found = []
    for method in ("off", "ngram"):
        config = EngineConfig(
            model=str(tiny[0]),
            dtype="float32",
            device="cuda",
            cache=CacheConfig(num_pages=200, page_size=8),
            scheduler=SchedulerConfig(max_running=8, check_integrity=True),
            speculative=SpeculativeConfig(method=method, draft_tokens=3),
        )
        with launch(config) as engine:
            engine.submit(asked)
            finals = {}
            for number in range(1000):
                if number in (9, 14):
                    engine.submit([late[number > 9]])
                finals |= {o.rid: o for o in engine.step() if o.finish is not None}
                if number > 14 and engine.idle():
                    break
        found.append(finals)
    plainly, drafting = found
    assert len(plainly) == 7
    for rid, output in plainly.items():
        assert drafting[rid].token_ids.tolist() == output.token_ids.tolist(), rid
        np.testing.assert_allclose(drafting[rid].logprobs, output.logprobs, atol=1e-4)
