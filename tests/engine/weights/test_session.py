"""The update transaction: everything that can go wrong leaves the old version serving."""

from __future__ import annotations

import pytest
import torch

from engine.errors import ManifestMismatch, UpdateOrder, WeightUpdateError
from engine.layers.runtime import LayerRuntime
from engine.models.build import build_model
from engine.models.config import read_config
from engine.protocol import BeginUpdate, TensorSpec
from engine.weights.initial import load_initial
from engine.weights.session import UpdateSession
from engine.weights.sources import random

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
NORM = "model.layers.1.input_layernorm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def make(tied: bool = True):
    runtime = LayerRuntime(device=torch.device("cpu"), dtype=torch.float32, backend="torch")
    config = read_config({**CONFIG, "tie_word_embeddings": tied})
    model = build_model(config, runtime=runtime)
    session = UpdateSession(model, version=3)
    load_initial(session.catalog, random.tensors(model.weight_index(), seed=0))
    return model, session


def fresh(model, seed: int = 1) -> dict[str, torch.Tensor]:
    return dict(random.tensors(model.weight_index(), seed=seed))


def contents(model) -> dict[str, torch.Tensor]:
    return {name: p.views(part)[0].clone() for name, (p, part) in model.weight_index().items()}


def specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(n, "float32", list(t.shape)) for n, t in tensors.items()]


def assert_equal(model, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in contents(model).items():
        assert torch.equal(value, tensors[name]), name


def test_a_whole_update_in_buckets_is_placed_in_place() -> None:
    model, session = make()
    pointers = [p.data_ptr() for p in model.parameters()]
    before, new = contents(model), fresh(model)
    items = list(new.items())
    session.begin(BeginUpdate(version=4, manifest=specs(new)))
    session.receive(items[:5])
    session.receive(items[5:])
    assert_equal(model, before)
    report = session.commit(4)
    assert_equal(model, new)
    assert (report.version, report.num_tensors) == (4, len(new))
    assert report.num_bytes == sum(t.numel() * 4 for t in new.values())
    assert session.version == 4
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_commands_may_be_repeated() -> None:
    model, session = make()
    begin = BeginUpdate(version=4)
    session.begin(begin)
    session.begin(begin)
    session.receive(fresh(model).items())
    report = session.commit(4)
    assert session.commit(4) is report
    session.abort(4)
    session.abort(9)
    assert session.version == 4


def test_the_tied_name_may_come_beside_or_instead() -> None:
    model, session = make()
    new = fresh(model)
    both = {**new, "lm_head.weight": new["model.embed_tokens.weight"].clone()}
    session.begin(BeginUpdate(version=4, manifest=specs(both)))
    session.receive(both.items())
    session.commit(4)
    renamed = fresh(model, seed=2)
    renamed["lm_head.weight"] = renamed.pop("model.embed_tokens.weight")
    session.begin(BeginUpdate(version=5))
    session.receive(renamed.items())
    session.commit(5)
    assert torch.equal(contents(model)["model.embed_tokens.weight"], renamed["lm_head.weight"])


def test_a_partial_update_changes_what_it_brings() -> None:
    model, session = make()
    before = contents(model)
    new = {NORM: torch.full((16,), 3.0), QUERY: torch.full((16, 16), 2.0)}
    session.begin(BeginUpdate(version=4, partial=True, manifest=specs(new)))
    session.receive(new.items())
    assert session.commit(4).num_tensors == 2
    assert_equal(model, {**before, **new})


def spoil(tensors: dict[str, torch.Tensor], how: str) -> list[tuple[str, torch.Tensor]]:
    items = list(tensors.items())
    if how == "unknown":
        return [*items, ("model.layers.7.weight", torch.zeros(2))]
    if how == "duplicate":
        return [*items, items[0]]
    if how == "missing":
        return [item for item in items if item[0] != QUERY]
    if how == "shape":
        return [(n, t[:-1] if n == QUERY else t) for n, t in items]
    if how == "integer":
        return [(n, t.int() if n == QUERY else t) for n, t in items]
    assert how == "tied"
    return [*items, ("lm_head.weight", tensors["model.embed_tokens.weight"] + 1)]


NAMED = {
    "unknown": "model.layers.7.weight",
    "duplicate": "model.embed_tokens.weight",
    "missing": QUERY,
    "shape": QUERY,
    "integer": QUERY,
    "tied": "lm_head.weight",
}


@pytest.mark.parametrize("how", NAMED)
def test_a_wrong_update_names_the_tensor_and_changes_nothing(how: str) -> None:
    model, session = make()
    before = contents(model)
    session.begin(BeginUpdate(version=4))
    with pytest.raises(ManifestMismatch) as refusal:
        session.receive(spoil(fresh(model), how))
        session.commit(4)
    assert refusal.value.field == NAMED[how]
    assert NAMED[how] in str(refusal.value)
    session.abort(4)
    assert_equal(model, before)
    assert session.version == 3
    session.begin(BeginUpdate(version=4))
    session.receive(fresh(model).items())
    session.commit(4)
    assert session.version == 4


def test_the_manifest_is_held_against_the_model_and_the_tensors() -> None:
    model, session = make()
    new = fresh(model)
    short = [s for s in specs(new) if s.name != QUERY]
    with pytest.raises(ManifestMismatch, match="q_proj"):
        session.begin(BeginUpdate(version=4, manifest=short))
    with pytest.raises(ManifestMismatch, match="twice"):
        session.begin(BeginUpdate(version=4, manifest=[*specs(new), specs(new)[0]]))
    session.begin(BeginUpdate(version=4, manifest=specs(new)))
    with pytest.raises(ManifestMismatch, match="bfloat16"):
        session.receive([(QUERY, new[QUERY].bfloat16())])
    with pytest.raises(ManifestMismatch, match="did not come"):
        session.commit(4)


@pytest.mark.parametrize("version", [3, 2])
def test_versions_go_forward(version: int) -> None:
    _, session = make()
    with pytest.raises(UpdateOrder, match="forward"):
        session.begin(BeginUpdate(version=version))


def test_commands_out_of_order() -> None:
    model, session = make()
    with pytest.raises(UpdateOrder, match="begin"):
        session.receive(fresh(model).items())
    with pytest.raises(UpdateOrder, match="begin"):
        session.commit(4)
    session.begin(BeginUpdate(version=4))
    with pytest.raises(UpdateOrder, match="version 4 is open"):
        session.begin(BeginUpdate(version=5))
    with pytest.raises(UpdateOrder, match="version 4"):
        session.commit(5)
    with pytest.raises(UpdateOrder, match="version 4"):
        session.abort(5)


def test_a_commit_that_dies_while_writing_refuses_to_serve(monkeypatch) -> None:
    model, session = make()
    session.begin(BeginUpdate(version=4))
    session.receive(fresh(model).items())

    def dies(*_args, **_kwargs):
        raise MemoryError

    monkeypatch.setattr(session.catalog, "place", dies)
    with pytest.raises(MemoryError):
        session.commit(4)
    with pytest.raises(WeightUpdateError, match="mixture"):
        session.require_servable()
    monkeypatch.undo()
    session.commit(4)
    session.require_servable()
