"""What an attention back end is: it prepares one step once, then attends layer by layer.

Legend: T tokens of the step, R rows, H query heads, K kv heads, D head dim, P page columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from kernels.rotary import KVTarget


@dataclass(frozen=True)
class AttentionBatch:
    """Where the rows of one step keep their KV. Row r computes tokens
    [query_start[r], query_start[r + 1]) of the step, the last of its `kv_lens[r]`.

    query_start_R1, kv_lens_R, slots_R: int64 on the host. host_pages: int32 [slots, P] on the
    host; page_table: the same on the device. write_slots_T: int64 [T] on the device, the
    place of each token in the pool (page * page_size + offset).
    """

    query_start_R1: np.ndarray
    kv_lens_R: np.ndarray
    slots_R: np.ndarray
    host_pages: np.ndarray
    page_table: torch.Tensor
    write_slots_T: torch.Tensor
    page_size: int
    device: torch.device

    @property
    def query_lens_R(self) -> np.ndarray:
        """Tokens of each row that this step computes, int64 [R]."""
        return np.diff(self.query_start_R1)


class NewHeads(Protocol):
    """Queries, keys and values that a layer computed for the tokens of a step, not rotated yet."""

    def store(self, target: KVTarget) -> torch.Tensor:
        """Rotate them and write keys and values to `target`, in one kernel where there is one.
        Returns the queries [T, H, D]."""
        ...

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, H, D], keys and values [T, K, D], rotated; nothing is written."""
        ...


class KVWrites(Protocol):
    """Where the tokens of one step keep their KV."""

    def store(self, layer_index: int, heads: NewHeads) -> torch.Tensor:
        """Write K and V of every token of the step to the pages of a layer. Returns the rotated
        queries [T, H, D]."""
        ...


class AttentionStep(Protocol):
    """One prepared step. Of each layer first all KV is written, then attention reads it: from the
    pages, as all later steps will."""

    @property
    def writes(self) -> KVWrites:
        """What writes the KV of the step's tokens."""
        ...

    def attend(self, layer_index: int, q_THD: torch.Tensor) -> torch.Tensor:
        """Attend causally to the KV that is written. Returns [T, H, D]."""
        ...


class AttentionBackend(Protocol):
    """Builds steps over one KV pool.

    The pool's layouts say what each layer stores and how many positions its queries see. A step is
    prepared for all layers.
    """

    name: str

    def prepare(self, batch: AttentionBatch) -> AttentionStep:
        """Everything that is equal for all layers of a step, or for all with one window."""
        ...


@dataclass(frozen=True, kw_only=True)
class DecodeLayout:
    """Where a captured step of one token a row finds its rows, for as long as its graph lives.

    The tensors are static: their addresses stay, their contents are those of the step that is
    replayed, written before attention runs. slots_R, kv_lens_R: int32 [R]; rows past the
    batch hold a slot that no request takes, and length 1. write_slots_R: int64 [R], as in
    `AttentionBatch`. query_start_R1: int32, 0 to R. page_table: int32 [slots, P]; host_pages: the
    same on the host, current whenever a step is refreshed. max_kv_len: no row of this graph is
    longer. run: rows of a sequence that verify its drafts: they come in runs of so many, each with
    the slot of its first row and a token longer than the one before, or with the slot that no
    request takes.
    """

    rows: int
    slots_R: torch.Tensor
    kv_lens_R: torch.Tensor
    write_slots_R: torch.Tensor
    query_start_R1: torch.Tensor
    page_table: torch.Tensor
    host_pages: np.ndarray
    max_kv_len: int
    page_size: int
    run: int = 1


class CapturedDecode(Protocol):
    """Attention of the CUDA graphs of one layout."""

    @property
    def step(self) -> AttentionStep:
        """What the captured forward pass calls; every replay runs the same kernels on whatever
        the buffers hold by then.

        A back end with more than one way to serve the layout may name another step after a
        refresh: each is captured once, and the one named is replayed.
        """
        ...

    def refresh(self, slots: np.ndarray, kv_lens: np.ndarray, *, exact: bool = True) -> None:
        """Queue what the captured step reads beside its layout: called once before a capture
        and before each replay, on the stream that replays.

        slots, kv_lens: int32 [R] on the host, padded as the layout's tensors are. They may be
        kept: nobody writes to them later. exact: they are what the layout's tensors will hold;
        else they are one for each run, none longer than told, and some rows may hold the slot that
        no request takes. A back end that plans for lengths refuses that.
        """
        ...


@runtime_checkable
class CapturableBackend(AttentionBackend, Protocol):
    """A back end whose decode step can be captured."""

    def capture_decode(self, layout: DecodeLayout) -> CapturedDecode:
        """Buffers and kernels of one graph, which serves rows of any KV length up to the layout's;
        called outside of the capture."""
        ...
