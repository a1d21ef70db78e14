"""Sampling parameters of every kind, as requests of the native dialect have them."""

from __future__ import annotations

from typing import Any

STOPS = list(range(2, 100, 9))
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "filters": {"top_k": 30, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": {7: 3.0, 8: -3.0, 9: -1e9}},
    "minimum": {"min_new_tokens": 15, "stop_token_ids": STOPS},
    "stops": {"stop_token_ids": STOPS},
    "greedy_penalised": {
        "temperature": 0.0,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "min_new_tokens": 9,
        "stop_token_ids": STOPS,
    },
    "all": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.005,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {11: 2.0},
        "min_new_tokens": 12,
        "stop_token_ids": STOPS,
    },
}
