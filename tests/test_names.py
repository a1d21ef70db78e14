"""No name without a use: what the product does not call is not there, and what is there is
reached by a test."""

from __future__ import annotations

import pytest

from tests.helpers.name_uses import PACKAGES, Uses, members, read_attributes

NOT_CALLED = {
    "kernels.testing": "what tests of kernels compare with, inside and outside this repository",
    "engine.errors.NonFiniteLogits": "known by its name: it crosses processes in a reply",
    "rollout.client.Client": "what a program that uses a server imports",
}
"""Modules and names that the product offers and does not use itself, and why."""
NOT_READ = {
    "engine.models.config.ModelConfig.bos_token_id": "config.json has it; checked when read",
}


@pytest.fixture(scope="module")
def uses() -> Uses:
    return Uses()


@pytest.mark.slow
def test_every_public_name_is_used_by_the_product(uses: Uses) -> None:
    unused = [f"{module}.{name}" for module, name in uses.public() if not by_product(uses, module, name)]
    assert unused == []


def by_product(uses: Uses, module: str, name: str) -> bool:
    if uses.in_product((module, name)) or name in ("main", "router"):
        return True
    return module in NOT_CALLED or f"{module}.{name}" in NOT_CALLED
