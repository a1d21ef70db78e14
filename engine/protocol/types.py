"""Array types and the words that fields of messages may hold."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int32]]

FloatArray = np.ndarray[Any, np.dtype[np.float32]]

PauseMode = Literal["abort", "retract", "keep"]

KvPolicy = Literal["keep", "recompute", "fresh"]

MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]

Rendezvous = Literal["torch", "vllm"]

BroadcastLayout = Literal["tensors", "flat", "buckets", "chunks"]

StagingMode = Literal["auto", "shadow", "undo", "in_place"]

CheckAction = Literal["checksum", "snapshot", "reset_tensors", "compare"]

FinishType = Literal["stop", "length", "abort"]
