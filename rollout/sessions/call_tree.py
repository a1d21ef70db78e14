"""The calls of one rollout as a tree: which call goes on from which, token by token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.protocol import (
    CallNode,
    CallPrefix,
    CallSample,
    IntArray,
    PromptQuery,
    RouteArray,
)

NODE_BYTES = 1024
"""About what a node takes beside its arrays."""

_ROOT = -1
_NO_IDS: IntArray = np.zeros(0, np.int32)


class _Mark(NamedTuple):
    """What a node is found by: the text and the key of everything up to its end."""

    num_bytes: int
    digest: bytes
    key: bytes


class CallTree:
    """A call goes on from the longest branch whose tokens begin its prompt; where there is none, it
    begins another. So each sampled token is the output of one node, and whatever repeats only part
    of it has it as prompt. Replies that were not whole are kept, and nothing goes on from them.

    num_bytes: memory taken.
    """

    def __init__(self) -> None:
        self.nodes: list[CallNode] = []
        self.num_bytes = 0
        self._marks: dict[int, _Mark] = {}
        self._below: dict[int, list[int]] = {}

    def add(self, sample: CallSample, call: int) -> None:
        """Put a sample of call number `call` where it belongs."""
        parent, start = self._deepest(sample.prompt_ids)
        index = len(self.nodes)
        node = CallNode(
            parent=parent,
            call=call,
            prompt_ids=sample.prompt_ids[start:].copy(),
            token_ids=sample.token_ids,
            logprobs=sample.logprobs,
            spans=sample.spans,
            finish=sample.finish,
            temperature=sample.temperature,
            logprob_law=sample.logprob_law,
            routed_experts=_own_routes(sample, start),
        )
        self.nodes.append(node)
        self.num_bytes += NODE_BYTES + _num_bytes(node)
        if sample.finish.type in ("stop", "length"):
            self._below.setdefault(parent, []).append(index)
            self._marks[index] = _Mark(sample.text_bytes, sample.text_digest, sample.key)

    def ids(self, index: int) -> IntArray:
        """The tokens of a node and of all that it goes on from, int32."""
        parts = [_NO_IDS]
        while index != _ROOT:
            node = self.nodes[index]
            parts += [node.token_ids, node.prompt_ids]
            index = node.parent
        return np.concatenate(parts[::-1])

    def prefix(self, query: PromptQuery) -> CallPrefix:
        """What a prompt goes on from: the longest branch whose text it begins with, or the
        conversation that it repeats if that has more tokens."""
        by_text, (by_key, key) = self._by_text(query.text), self._by_key(query.keys)
        text_ids, key_ids = self.ids(by_text), self.ids(by_key)
        if len(key_ids) > len(text_ids):
            matched = self.nodes[by_key].finish.matched
            stopped = matched if isinstance(matched, int) else -1
            return CallPrefix(ids=key_ids, text_bytes=-1, key=key, stopped=stopped)
        if by_text == _ROOT:
            return CallPrefix()
        return CallPrefix(ids=text_ids, text_bytes=self._marks[by_text].num_bytes)

    def _deepest(self, prompt: IntArray) -> tuple[int, int]:
        """The node that ends the longest branch that `prompt` begins with, the last of several,
        and the number of its tokens."""
        best, best_end = _ROOT, 0
        pending = [(_ROOT, 0)]
        while pending:
            above, start = pending.pop()
            for index in self._below.get(above, ()):
                node = self.nodes[index]
                middle = start + len(node.prompt_ids)
                end = middle + len(node.token_ids)
                begins = np.array_equal(prompt[start:middle], node.prompt_ids)
                if begins and np.array_equal(prompt[middle:end], node.token_ids):
                    pending.append((index, end))
                    if (end, index) > (best_end, best):
                        best, best_end = index, end
        return best, best_end

    def _by_text(self, text: str) -> int:
        """The last node of those whose text is the longest that `text` begins with."""
        data, hashed, done = text.encode(), hashlib.sha256(), 0
        best = _ROOT
        for size, index in sorted((mark.num_bytes, i) for i, mark in self._marks.items()):
            if not 0 < size <= len(data):
                continue
            hashed.update(data[done:size])
            done = size
            if hashed.digest() == self._marks[index].digest:
                best = index
        return best

    def _by_key(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """The last node with the last of `keys` that any has, and the number of that key."""
        found = {mark.key: index for index, mark in self._marks.items() if mark.key}
        for number in range(len(keys) - 1, -1, -1):
            if keys[number] in found:
                return found[keys[number]], number
        return _ROOT, -1


def _own_routes(sample: CallSample, start: int) -> RouteArray | None:
    """The routes of a sample from the token before its own first one on, which its parent sampled
    last and has no route of. start: tokens that are its parent's."""
    first = max(start - 1, 0) - sample.routed_experts_start
    if sample.routed_experts is None or first < 0:
        return None
    return sample.routed_experts[first:].copy()


def _num_bytes(node: CallNode) -> int:
    routes = 0 if node.routed_experts is None else node.routed_experts.nbytes
    return node.prompt_ids.nbytes + node.token_ids.nbytes + node.logprobs.nbytes + routes
