"""What the rollout benchmark computes besides clocks: workloads, floors, earlier figures."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.protocol import FinishReason, Request, RequestOutput, SamplingParams

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("name", "prompts", "samples", "given", "asked"),
    [
        ("group", 64, 16, 64 * 512, 64 * 16 * 1024),
        ("group8", 16, 16, 16 * 512, 256 * 512),
        ("wb_long", 64, 16, 64 * 1024, 1024 * 1024),
        ("single", 1, 1, 512, 256),
        ("wa", 256, 1, 142_827, 133_966),
    ],
)
def test_workloads(name: str, prompts: int, samples: int, given: int, asked: int) -> None:
    from gpu_rollout_workloads import make_workload

    work = make_workload(name)
    requests = work.requests(1000, seed=3)
    assert (work.prompts, work.samples) == (prompts, samples)
    assert sum(len(r.prompt_ids) for r in requests[::samples]) == given
    assert sum(r.sampling.max_new_tokens for r in requests) == asked
    assert len({r.prompt_ids.tobytes() for r in requests}) == prompts
    assert len({r.seed for r in requests}) == len(requests)
    again = work.requests(1000, seed=4)
    assert again[0].prompt_ids.tolist() != requests[0].prompt_ids.tolist()


@pytest.mark.parametrize("share", [False, True])
def test_the_floor_is_the_sum_over_steps(share: bool) -> None:
    from gpu_rollout_workloads import ModelBytes, Workload, floor_seconds

    prompt_lens, output_lens = np.array([5, 9]), np.array([3, 1, 4, 2])
    work = Workload(name="x", samples=2, prompt_lens=prompt_lens, output_lens=output_lens)
    model = ModelBytes(params=10, weight_bytes=20, kv_bytes_per_token=7)
    got = floor_seconds(work, model, copy_bytes_s=2.0, flops=3.0, share_prompts=share)
    want = 2 * 10 * (5 + 9) / 3.0
    for step in range(1, 4):
        rows = [row for row in range(4) if output_lens[row] > step]
        want += max(20 / 2.0, 2 * 10 * len(rows) / 3.0)
        prompts = [row // 2 for row in rows]
        read = sum(prompt_lens[p] for p in (set(prompts) if share else prompts))
        want += 7 * (read + step * len(rows)) / 2.0
    assert got == pytest.approx(want)


def write(path: Path, *, machine: str = "gpu", model: str = "m/config.json", **report) -> None:
    path.write_text(json.dumps({"machine": machine, "options": {"model": model}, **report}))


def test_previous_figures_are_the_newest_of_machine_and_model(tmp_path: Path) -> None:
    from gpu_rollout_previous import previous_figures

    write(tmp_path / "a.json", workloads={"group": {"tokens_per_s": 1}, "tail": {}})
    write(tmp_path / "b.json", date="2026-02", model="m", workloads={"group": {"tokens_per_s": 3}})
    write(tmp_path / "c.json", date="2026-01", model="m", workloads={"group": {"tokens_per_s": 2}})
    write(tmp_path / "d.json", date="2027-01", machine="b", workloads={"group": {}})
    write(tmp_path / "e.json", date="2027-01", model="n", workloads={"group": {}})
    (tmp_path / "f.json").write_text("[1, 2]")

    def find(workload: str, source: Path = tmp_path):
        found = previous_figures(source, machine="gpu", model="shapes/m.json", workload=workload)
        return found and found[0]

    assert find("group") == "b.json"
    assert find("tail") == "a.json"
    assert find("single") is None
    assert find("group", tmp_path / "c.json") == "c.json"


def test_previous_figures_are_of_the_same_scheme(tmp_path: Path) -> None:
    from gpu_rollout_previous import previous_figures

    for name, scheme in (("a", "none"), ("b", "int8"), ("c", "none")):
        options = {"model": "m", "quantization": scheme}
        report = {"machine": "gpu", "date": name, "options": options, "workloads": {"single": {}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    asked = {"machine": "gpu", "model": "m", "workload": "single"}
    assert previous_figures(tmp_path, **asked, quantization="int8") == ("b.json", {})
    assert previous_figures(tmp_path, **asked) == ("c.json", {})


def test_int8_weights_are_a_byte_each_but_for_the_head() -> None:
    from gpu_rollout import model_bytes

    shape = str(ROOT / "benchmarks" / "shapes" / "qwen3-8b.json")
    plain, int8 = (model_bytes(shape, 8_190_735_360, scheme) for scheme in ("none", "int8"))
    head = 151936 * 4096
    assert plain.params == int8.params == 8_190_735_360 - head
    assert plain.weight_bytes == 2 * plain.params
    assert int8.weight_bytes == (plain.params - head) + 2 * head


def test_results_in_the_repository_are_read() -> None:
    from gpu_rollout_previous import previous_figures

    found = previous_figures(
        ROOT / "benchmarks" / "results",
        machine="NVIDIA H100 80GB HBM3",
        model="benchmarks/shapes/qwen2.5-1.5b.json",
        workload="group",
    )
    assert found is not None
    assert found[1]["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("shape", "params"),
    [
        ("qwen2.5-0.5b", 0.494e9),
        ("qwen2.5-1.5b", 1.544e9),
        ("qwen3-0.6b", 0.596e9),
        ("qwen3-8b", 8.191e9),
    ],
)
def test_shapes_have_the_parameters_of_their_models(shape: str, params: float) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(ROOT / "benchmarks" / "shapes" / f"{shape}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == pytest.approx(params, rel=2e-3)


@pytest.mark.parametrize("wanted", [True, False])
def test_replies_differ_by_their_logprobs_alone(wanted: bool) -> None:
    from gpu_rollout_logprobs import encode_reply

    request = Request(
        rid="r", prompt_ids=np.array([1], np.int32), sampling=SamplingParams(), seed=0
    )
    output = RequestOutput(
        rid="r",
        start=0,
        token_ids=np.array([4, 5], np.int32),
        logprobs=np.array([-0.5, -2.0], np.float32),
        finish=FinishReason(type="length"),
    )
    reply = msgspec.json.decode(encode_reply(request, output, wanted))
    assert reply["output_ids"] == [4, 5]
    found = reply["meta_info"].get("output_token_logprobs")
    assert found == ([[-0.5, 4, None], [-2.0, 5, None]] if wanted else None)
