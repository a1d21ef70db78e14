"""How old what a step trains on is: figures of the versions that sampled its tokens.

The lag of a token is the version that learns from it less the one that sampled it; the age of a
reply is the lag of its oldest token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from recipes.types import Group


def lag_figures(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Of the graded replies of `groups`, which the weights `version` learn from; nothing without a
    token.

    staleness_mean, staleness_max: lag of a token. age_mean, age_max: of a reply.
    versions_per_sample: how many versions sampled one reply. lag_share/K: share of tokens of lag K.
    """
    spans = [t.spans for group in groups for t in group.graded if t.spans]
    tokens: Counter[int] = Counter()
    for span in (span for each in spans for span in each):
        tokens[version - span.version] += span.end - span.start
    total = tokens.total()
    if not total:
        return {}
    ages = [version - min(span.version for span in each) for each in spans]
    shares = {f"async/lag_share/{lag}": tokens[lag] / total for lag in range(max(tokens) + 1)}
    return {
        "async/staleness_mean": sum(lag * num for lag, num in tokens.items()) / total,
        "async/staleness_max": float(max(tokens)),
        "async/age_mean": float(np.mean(ages)),
        "async/age_max": float(max(ages)),
        "async/versions_per_sample": float(np.mean([len(each) for each in spans])),
        **shares,
    }
