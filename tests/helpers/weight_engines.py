"""The weight side of an engine rank on a tiny model, and a trainer's end of its groups."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch

from engine.layers.parameter import Part
from engine.layers.runtime import LayerRuntime
from engine.models.build import build_model
from engine.models.config import read_config
from engine.parallel.mesh import Mesh
from engine.protocol import JoinGroup, TensorPiece, TensorSpec
from engine.quant.base import LinearMethod, Unquantized
from engine.weights.initial import load_initial
from engine.weights.service import WeightService
from engine.weights.sources import random
from trainer_bridge.process_group import SenderGroup

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 33,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
VERSION = 3
Tensors = dict[str, torch.Tensor]


def make_rank(
    tp_rank: int = 0,
    tp_size: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    linear: LinearMethod | None = None,
    num_layers: int = CONFIG["num_hidden_layers"],
    ep: bool = False,
    config: dict[str, Any] = CONFIG,
    **service: Any,
) -> tuple[Any, WeightService]:
    """(model, its weight service) of one rank, serving version 3 of the weights of seed 0."""
    mesh = Mesh(tp_rank=tp_rank, tp_size=tp_size, ep_size=tp_size if ep else 1)
    device = torch.device("cpu")
    runtime = LayerRuntime(
        device=device, dtype=dtype, backend="torch", mesh=mesh, linear=linear or Unquantized()
    )
    read = read_config({**config, "num_hidden_layers": num_layers})
    model = build_model(read, runtime=runtime)
    settings = {"agree": lambda value: value, "require_weights": lambda: None, **service}
    weights = WeightService(model, version=VERSION, device=device, mesh=mesh, **settings)
    load_initial(weights.session.catalog, random.tensors(model.weight_index(), seed=0))
    return model, weights


def fresh(model: Any, seed: int = 1) -> Tensors:
    """Other weights for the model: full tensors by name."""
    return dict(random.tensors(model.weight_index(), seed=seed))


def contents(model: Any) -> Tensors:
    """A copy of this rank's slices of every tensor."""
    return {name: p.views(part)[0].clone() for name, (p, part) in model.weight_index().items()}


def storages(model: Any) -> Tensors:
    """A copy of all that this rank stores, by the name of each parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_holds(model: Any, tensors: Tensors) -> None:
    """Every live weight is this rank's slice of the full tensor."""
    for name, (parameter, part) in model.weight_index().items():
        want = slice_of(parameter.parts[part], tensors[name])
        assert torch.equal(parameter.views(part)[0], want.to(parameter.dtype)), name


def slice_of(part: Part, full: torch.Tensor) -> torch.Tensor:
    """The elements of a full tensor that a rank holds in one piece: a view."""
    (piece,) = part.pieces
    return full[piece.source]


def specs(tensors: Tensors, **fields: Any) -> list[TensorSpec]:
    """The manifest of full tensors."""
    return [TensorSpec(n, _name(t.dtype), list(t.shape), **fields) for n, t in tensors.items()]


def pieces(tensors: Tensors) -> list[TensorPiece]:
    """Each tensor as a whole piece."""
    return [TensorPiece(n, _name(t.dtype), list(t.shape)) for n, t in tensors.items()]


def split(tensors: Tensors, parts: int) -> list[list[tuple[TensorPiece, torch.Tensor]]]:
    """What each of `parts` senders holds: an uneven share of every flattened tensor."""
    shares: list[list[tuple[TensorPiece, torch.Tensor]]] = [[] for _ in range(parts)]
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        cuts = [flat.numel() * part // parts for part in range(parts + 1)]
        for share, (start, stop) in zip(shares, pairwise(cuts), strict=True):
            piece = TensorPiece(name, _name(tensor.dtype), list(tensor.shape), start, stop)
            share.append((piece, flat[start:stop]))
    return shares


def join(
    ranks: Sequence[WeightService], name: str = "g", *, timeout_s: float = 10.0
) -> SenderGroup:
    """A gloo group of a sender, which is returned, and these ranks."""
    sender = SenderGroup(name, world_size=1 + len(ranks), backend="gloo", timeout_s=timeout_s)
    with ThreadPoolExecutor(len(ranks)) as pool:
        joined = [
            pool.submit(
                rank.handle,
                # Ranks here are engines of their own, so each has its own offset.
                join_command(sender, index + 1 - rank.groups.rank, timeout_s=timeout_s),
            )
            for index, rank in enumerate(ranks)
        ]
        sender.connect()
        for future in joined:
            future.result(timeout_s)
    return sender


def join_command(sender: SenderGroup, rank_offset: int, **fields: Any) -> JoinGroup:
    """How an engine joins the sender's group."""
    return JoinGroup(
        name=sender.name,
        address=sender.address,
        port=sender.port,
        **{
            "rank_offset": rank_offset,
            "world_size": sender.world_size,
            "backend": "gloo",
            **fields,
        },
    )


def send(sender: SenderGroup, tensors: Iterable[torch.Tensor], timeout_s: float = 10.0) -> None:
    """Broadcast tensors one after the other, each as it is."""
    deadline = time.monotonic() + timeout_s
    for tensor in tensors:
        sender.wait(sender.broadcast(tensor.contiguous()), deadline)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
