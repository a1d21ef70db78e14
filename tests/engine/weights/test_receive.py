"""Broadcasts into the open update: every layout, shards, pieces, several senders and ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.errors import ManifestMismatch
from engine.protocol import BeginUpdate, CommitUpdate, ReceiveBroadcast, plan_buckets
from tests.helpers.weight_engines import (
    assert_holds,
    contents,
    fresh,
    join,
    make_rank,
    pieces,
    send,
    specs,
    split,
)

NORM = "model.norm.weight"


def packed(tensors: dict[str, torch.Tensor], layout: str, bucket_bytes: int) -> list[torch.Tensor]:
    """What a sender broadcasts, written out anew from the layout's description."""
    flats = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    if layout == "tensors":
        return list(tensors.values())
    if layout == "flat":
        return [torch.cat(flats)]
    if layout == "chunks":
        chunks, current = [], []
        for flat in flats:
            current.append(flat)
            if sum(f.numel() for f in current) > bucket_bytes:
                chunks.append(torch.cat(current))
                current = []
        return chunks + ([torch.cat(current)] if current else [])
    return [_filled(bucket, tensors) for bucket in plan_buckets(pieces(tensors), bucket_bytes)]


def _filled(bucket, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    buffer = torch.full((bucket.num_bytes,), 255, dtype=torch.uint8)
    for placement in bucket.placements:
        flat = tensors[placement.piece.name].reshape(-1).view(torch.uint8)
        buffer[placement.offset : placement.offset + placement.num_bytes] = flat
    return buffer


def run_update(rank, sender, new, *, version: int = 4, mode: str = "auto", **receive) -> None:
    """One whole update; the sender broadcasts beside the engine's receive."""
    layout = receive.get("layout", "buckets")
    command = ReceiveBroadcast(group="g", tensors=pieces(new), **receive)
    rank.handle(BeginUpdate(version=version, manifest=specs(new), mode=mode))
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, sender, packed(new, layout, command.bucket_bytes))
        rank.handle(command)
        sent.result(60)
    rank.handle(CommitUpdate(version=version))


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize("layout", ["tensors", "flat", "buckets", "chunks"])
def test_every_layout_brings_every_tensor(layout: str, mode: str) -> None:
    model, rank = make_rank()
    pointers = [p.data_ptr() for p in model.parameters()]
    sender = join([rank])
    for version in (4, 5):
        new = fresh(model, seed=version)
        # Two and four bytes in turn: layouts without padding then break the alignment.
        new[NORM] = new[NORM][:15].repeat(2)[:16].bfloat16()
        run_update(rank, sender, new, version=version, mode=mode, layout=layout, bucket_bytes=3000)
        assert_holds(model, new)
        assert rank.session.version == version
    assert [p.data_ptr() for p in model.parameters()] == pointers
    rank.close()


def test_odd_sizes_behind_each_other_are_not_misread() -> None:
    model, rank = make_rank(dtype=torch.bfloat16)
    new = {
        name: tensor.bfloat16() if index % 2 else tensor
        for index, (name, tensor) in enumerate(fresh(model).items())
    }
    # 33 rows of 16 bf16 leave the next float32 tensor aligned; one odd element does not.
    sender = join([rank])
    run_update(rank, sender, new, layout="flat")
    assert_holds(model, new)
    rank.close()


def test_a_shadow_touches_nothing_before_the_commit() -> None:
    model, rank = make_rank()
    sender, before, new = join([rank]), contents(model), fresh(model)
    rank.handle(BeginUpdate(version=4, mode="shadow"))
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, sender, packed(new, "buckets", 1 << 20))
        rank.handle(ReceiveBroadcast(group="g", tensors=pieces(new), bucket_bytes=1 << 20))
        sent.result(60)
    assert_holds(model, before)
    assert rank.session.refusal == ""
    rank.handle(CommitUpdate(version=4))
    assert_holds(model, new)
    rank.close()


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
def test_ranks_of_a_sharded_engine_each_place_their_slice(mode: str) -> None:
    pairs = [make_rank(rank, 2) for rank in range(2)] + [make_rank()]
    ranks = [rank for _, rank in pairs]
    sender, new = join(ranks), fresh(pairs[2][0])
    command = ReceiveBroadcast(group="g", tensors=pieces(new), bucket_bytes=2048)
    for rank in ranks:
        rank.handle(BeginUpdate(version=4, manifest=specs(new), mode=mode))
    with ThreadPoolExecutor(len(ranks)) as pool:
        received = [pool.submit(rank.handle, command) for rank in ranks]
        send(sender, packed(new, "buckets", 2048))
        for future in received:
            future.result(60)
    for model, rank in pairs:
        rank.handle(CommitUpdate(version=4))
        assert_holds(model, new)
        rank.close()


@pytest.mark.parametrize("mode", ["shadow", "undo", "in_place"])
@pytest.mark.parametrize("bucket_bytes", [700, 1 << 20])
def test_several_senders_bring_a_piece_of_every_tensor_each(mode: str, bucket_bytes: int) -> None:
    model, rank = make_rank()
    senders = [join([rank], name) for name in ("g-0", "g-1", "g-2")]
    new = fresh(model)
    shares = split(new, 3)
    rank.handle(BeginUpdate(version=4, manifest=specs(new), mode=mode))
    with ThreadPoolExecutor(3) as pool:
        sent = []
        for sender, share in zip(senders, shares, strict=True):
            flats = {piece.name: flat for piece, flat in share}
            buckets = plan_buckets([piece for piece, _ in share], bucket_bytes)
            sent.append(pool.submit(send, sender, [_filled(b, flats) for b in buckets]))
        for index, share in enumerate(shares):
            rank.handle(
                ReceiveBroadcast(
                    group=f"g-{index}",
                    tensors=[piece for piece, _ in share],
                    bucket_bytes=bucket_bytes,
                )
            )
        for future in sent:
            future.result(60)
    report = rank.handle(CommitUpdate(version=4)).report
    assert report is not None and report.num_tensors == len(new)
    assert_holds(model, new)
    assert rank.groups.names == ["g-0", "g-1", "g-2"]
    rank.close()


def test_elements_that_no_sender_has_are_named() -> None:
    model, rank = make_rank()
    sender, new = join([rank]), fresh(model)
    share = split(new, 2)[0]
    rank.handle(BeginUpdate(version=4, manifest=specs(new)))
    with ThreadPoolExecutor(1) as pool:
        flats = {piece.name: flat for piece, flat in share}
        [bucket] = plan_buckets([piece for piece, _ in share], 1 << 20)
        sent = pool.submit(send, sender, [_filled(bucket, flats)])
        rank.handle(ReceiveBroadcast(group="g", tensors=[piece for piece, _ in share]))
        sent.result(60)
    with pytest.raises(ManifestMismatch, match=r"elements \[264, 528\) of model.embed"):
        rank.handle(CommitUpdate(version=4))
    rank.close()


def test_a_bucket_that_comes_again_is_refused_before_anything_moves() -> None:
    model, rank = make_rank()
    sender, new = join([rank]), fresh(model)
    rank.handle(BeginUpdate(version=4, manifest=specs(new)))
    command = ReceiveBroadcast(group="g", tensors=pieces(new))
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, sender, packed(new, "buckets", command.bucket_bytes))
        rank.handle(command)
        sent.result(60)
    with pytest.raises(ManifestMismatch, match="came twice"):
        rank.handle(command)
    rank.handle(CommitUpdate(version=4))
    assert_holds(model, new)
    rank.close()
