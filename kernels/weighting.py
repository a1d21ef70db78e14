"""How a norm applies its weight. Torch-free, so that a model's configuration can name it."""

from __future__ import annotations

from typing import Literal

Weighting = Literal["rounded", "wide", "offset"]
"""rounded: normalised values are rounded to the dtype of x, then multiplied by the weight (Llama).
wide: they are multiplied in float32 and rounded once (OLMo 2). offset: as wide, by 1 + weight
(Gemma)."""
