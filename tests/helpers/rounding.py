"""How far two right answers may part because float32 sums were taken in another order.

A product of n terms is summed in an order that depends on the processor, the number of threads and
the number of rows multiplied at once. Two orders differ by at most 2 n u sum|x w| (u the unit
roundoff), and by some 2 sqrt(n) u times the size of the sum when the roundings are independent
(Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019). A test that
compares logprobs of batches of different composition compares them within `logprob_bound`; one
that compares the same batch on the same number of threads may ask for equal bits.
"""

from __future__ import annotations

import math
from typing import Any

UNIT_ROUNDOFF = 2.0**-24
# Standard deviations that a sum of roundings may take; beyond four is one sum in ten thousand.
SIGMAS = 4
PRODUCTS_PER_LAYER = 7


def logprob_bound(config: Any, weight_std: float = 0.15) -> float:
    """Largest difference of a logprob between two batch compositions in float32.

    config: a transformers configuration of a tiny model; weight_std: standard deviation of its
    weights (`tests/helpers/tiny_models.py`). After the final norm an element of x is of size 1, so
    a logit is of size sqrt(hidden) weight_std, and each of the products that led to it adds an
    independent relative error. log_softmax takes the difference of two such values.
    """
    terms = max(config.hidden_size, config.intermediate_size)
    products = PRODUCTS_PER_LAYER * config.num_hidden_layers + 1
    relative = 2 * SIGMAS * math.sqrt(terms * products) * UNIT_ROUNDOFF
    return 2 * relative * math.sqrt(config.hidden_size) * weight_std


# Of one layer: norm (before and after its weight), query, rotation, attention, its product and sum;
# norm, gate, activation, gated product, its product and sum.
STORED_PER_LAYER = 13


def stored_logprob_bound(config: Any, unit_roundoff: float, weight_std: float = 0.15) -> float:
    """Largest difference of a logprob between two right answers that store every value in 16 bits
    and sum in float32.

    unit_roundoff: 2**-11 in float16, 2**-8 in bfloat16. config, weight_std: see `logprob_bound`.
    Each value that is stored on the way to a logit adds an independent relative error of about the
    unit roundoff, whichever the number of terms in its sum.
    """
    stored = STORED_PER_LAYER * config.num_hidden_layers + 3
    relative = SIGMAS * math.sqrt(stored) * unit_roundoff
    return 2 * relative * math.sqrt(config.hidden_size) * weight_std
