"""Packing of sequences as a tree of shared prefixes: every distinct prefix is computed once.

The samples of a group share their prompt, and the prompts of a few-shot task share their worked
examples. In a causal model the state at a token depends on its ancestors alone, so a tree of
tokens under an ancestor mask gives the same states, and the same gradients, as the sequences one
by one. The idea of sharing a group's prompt is Prefix Grouper's (arXiv 2506.05433); a tree takes
it to any shared prefix.

Routes of a mixture of experts (`recipes/trainers/replay.py`) belong to a token and its prefix, but
also to the weights and the step that computed it: where two samples went to different experts
behind equal tokens, their paths part there, and each keeps its own.

Legend: T nodes of the tree, P nodes whose logits are needed, K response tokens of all sequences
laid end to end, N sequences. Of routes: L decoder layers, E experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.protocol import IntArray, RouteArray

Int64Array = np.ndarray[Any, np.dtype[np.int64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

ROOT = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResponse:
    """One prompt and its response, int32 [prompt_len] and [response_len].

    routes: uint8 or uint16 [prompt_len + response_len - 1, L, E], the experts that each token but
    the last goes to; None where it is routed as the model will have it.
    """

    prompt_ids: IntArray
    response_ids: IntArray
    routes: RouteArray | None = None

    def route_rows(self) -> list[bytes]:
        """The routes token by token; b"" for none."""
        num = len(self.prompt_ids) + len(self.response_ids) - 1
        return [b""] * num if self.routes is None else [row.tobytes() for row in self.routes]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixTree:
    """A packed micro-batch; int64 arrays. Parents come before children.

    token_ids, depths, parents: [T]; depth 0 is a first token, its parent is -1.
    predicting: [P] nodes that predict some response token.
    rows: [K] index into `predicting` of the node that predicts each response token.
    targets: [K] the response tokens. sequence: [K] which sequence each belongs to.
    routes: uint8 or uint16 [T, L, E], absent (the largest number) for tokens without; None where
        no sequence has any.
    """

    token_ids: Int64Array
    depths: Int64Array
    parents: Int64Array
    predicting: Int64Array
    rows: Int64Array
    targets: Int64Array
    sequence: Int64Array
    num_sequences: int
    routes: RouteArray | None = None

    def ancestor_mask(self) -> BoolArray:
        """bool [T, T]: node t may attend to node u if u is t or an ancestor of t."""
        num = len(self.parents)
        mask_TT = np.zeros((num, num), dtype=np.bool_)
        for node, parent in enumerate(self.parents.tolist()):
            if parent != ROOT:
                mask_TT[node] = mask_TT[parent]
            mask_TT[node, node] = True
        return mask_TT

    def window_mask(self, window: int) -> BoolArray:
        """bool [T, T]: `ancestor_mask` as far as the last `window` nodes of a path, t the last."""
        distance_TT = self.depths[:, None] - self.depths[None, :]
        mask_TT: BoolArray = self.ancestor_mask() & (distance_TT < window)
        return mask_TT


@dataclass(slots=True)
class _Trie:
    """A growing trie of tokens and their routes. `prompts` remembers where each prompt ends."""

    children: dict[tuple[int, int, bytes], int] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    routes: list[bytes] = field(default_factory=list)
    prompts: dict[tuple[bytes, bytes], int] = field(default_factory=dict)

    def walk(self, node: int, tokens: Iterable[int], routes: Iterable[bytes]) -> list[int]:
        """Nodes of `tokens` below `node`, made where they are missing."""
        path = []
        for token, route in zip(tokens, routes, strict=True):
            child = self.children.setdefault((node, token, route), len(self.token_ids))
            if child == len(self.token_ids):
                self.token_ids.append(token)
                self.parents.append(node)
                self.routes.append(route)
            path.append(child)
            node = child
        return path

    def insert(self, sequence: PromptResponse) -> list[int]:
        """Add a sequence; returns the nodes that predict its response tokens, in order.

        The last response token predicts nothing and gets no node.
        """
        num, rows = len(sequence.prompt_ids), sequence.route_rows()
        key = (sequence.prompt_ids.tobytes(), b"".join(rows[:num]))
        last = self.prompts.get(key)
        if last is None:
            last = self.walk(ROOT, sequence.prompt_ids.tolist(), rows[:num])[-1]
            self.prompts[key] = last
        return [last, *self.walk(last, sequence.response_ids[:-1].tolist(), rows[num:])]

    def depths(self) -> list[int]:
        """Depth of each node; a parent is always made before its children."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == ROOT else depths[parent] + 1)
        return depths


def build_tree(sequences: Sequence[PromptResponse]) -> PrefixTree:
    """Pack sequences, each with a prompt and a response of at least one token."""
    trie = _Trie()
    nodes_K: list[int] = []
    sequence_K: list[int] = []
    for index, sequence in enumerate(sequences):
        assert len(sequence.prompt_ids) > 0 and len(sequence.response_ids) > 0
        nodes = trie.insert(sequence)
        nodes_K.extend(nodes)
        sequence_K.extend([index] * len(nodes))
    predicting_P, rows_K = np.unique(np.asarray(nodes_K, dtype=np.int64), return_inverse=True)
    return PrefixTree(
        token_ids=np.asarray(trie.token_ids, dtype=np.int64),
        depths=np.asarray(trie.depths(), dtype=np.int64),
        parents=np.asarray(trie.parents, dtype=np.int64),
        predicting=predicting_P,
        rows=rows_K.astype(np.int64),
        targets=np.concatenate([s.response_ids for s in sequences]).astype(np.int64),
        sequence=np.asarray(sequence_K, dtype=np.int64),
        num_sequences=len(sequences),
        routes=_stacked(trie.routes, sequences),
    )


def _stacked(rows: Sequence[bytes], sequences: Sequence[PromptResponse]) -> RouteArray | None:
    """Routes of nodes as one array."""
    like = next((s.routes for s in sequences if s.routes is not None), None)
    if like is None:
        return None
    shape = (len(rows), *like.shape[1:])
    absent = np.full(shape[1:], np.iinfo(like.dtype).max, dtype=like.dtype).tobytes()
    joined = b"".join(row or absent for row in rows)
    return np.frombuffer(joined, dtype=like.dtype).reshape(shape)


def pack(sequences: Sequence[PromptResponse], max_tokens: int) -> list[list[int]]:
    """Cut sequences into micro-batches of at most `max_tokens` tree nodes each.

    Returns lists of indices into `sequences`, in order. Sequences with the same prompt that
    follow each other stay together unless they alone are too many; one sequence longer than
    the budget gets a micro-batch of its own.
    """
    packer = _Packer(sequences, max_tokens)
    for unit in _runs(sequences):
        packer.add(unit)
    packer.close()
    return packer.batches


def _runs(sequences: Sequence[PromptResponse]) -> list[list[int]]:
    runs: list[list[int]] = []
    previous: bytes | None = None
    for index, sequence in enumerate(sequences):
        key = sequence.prompt_ids.tobytes()
        if key == previous:
            runs[-1].append(index)
        else:
            runs.append([index])
        previous = key
    return runs


class _Packer:
    """Fills one trie at a time and closes it when the next unit does not fit."""

    def __init__(self, sequences: Sequence[PromptResponse], max_tokens: int) -> None:
        self.sequences = sequences
        self.max_tokens = max_tokens
        self.batches: list[list[int]] = []
        self.current: list[int] = []
        self.trie = _Trie()

    def add(self, unit: list[int]) -> None:
        if self._fits(unit):
            self.current.extend(unit)
            return
        if self.current:
            self.close()
            self.add(unit)
        elif len(unit) > 1:
            self.trie = _Trie()
            for index in unit:
                self.add([index])
        else:
            self.current.extend(unit)

    def _fits(self, unit: list[int]) -> bool:
        """Whether the trie is within budget with the unit. It is spoilt if not."""
        for index in unit:
            self.trie.insert(self.sequences[index])
        return len(self.trie.token_ids) <= self.max_tokens

    def close(self) -> None:
        if self.current:
            self.batches.append(self.current)
        self.current = []
        self.trie = _Trie()
