"""Numbers that a model gave a text, as replies have them: vectors, cosines, probabilities."""

from __future__ import annotations

import base64

import numpy as np

from engine.protocol import FloatArray


def shaped(vector: FloatArray, *, dimensions: int | None, normalize: bool) -> FloatArray:
    """The first `dimensions` numbers of an embedding, float32, of length 1 if they are normalised.
    A vector of zeros has no direction and stays."""
    vector = vector[:dimensions]
    return unit(vector) if normalize else vector


def unit(vector: FloatArray) -> FloatArray:
    """The vector at length 1, float32."""
    wide = vector.astype(np.float64)
    length = float(np.linalg.norm(wide))
    return vector if length == 0.0 else (wide / length).astype(np.float32)


def as_base64(vector: FloatArray) -> str:
    """Its float32 numbers, little-endian, as OpenAI's clients read them."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def probabilities(logits: FloatArray) -> list[float]:
    """Of labels that exclude each other: a softmax; of a single label a sigmoid."""
    return [sigmoid(float(logits[0]))] if len(logits) == 1 else softmax(logits)


def softmax(logits: FloatArray) -> list[float]:
    """exp(logit), of sum 1; -inf is 0, if some are not."""
    wide = logits.astype(np.float64)
    found = np.exp(wide - wide.max())
    result: list[float] = (found / found.sum()).tolist()
    return result


def sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)), which does not overflow."""
    return float(0.5 * (1.0 + np.tanh(0.5 * logit)))
