"""No name without a use: what nobody calls is not there, and what is there a test reaches."""

from __future__ import annotations

import pytest

from tests.helpers.name_uses import PACKAGES, Uses, members, read_attributes, read_by_scripts

NOT_CALLED = {
    "kernels.testing": "what tests of kernels compare with",
    "kernels.collectives.reference.all_reduce_add_rms_norm": "what its kernel is compared with",
    "engine.errors.NonFiniteLogits": "known by its name, which crosses processes in a reply",
    "rollout.client.Client": "what a program that uses a server imports",
    "rollout.client.routed_experts": "for a program that trains on what a server returned",
    "recipes.collecting.captured": "for a trainer of agents that use a server",
    "rollout.requests.generate.classify": "for a program that scores in its own process",
    "trainer_bridge.hf.load_classifier": "for a trainer of a reward model, or of a critic from one",
    "engine.models.deepseek_experts.v2_experts": "of DeepSeek-V2, whose attention is not built",
    "rollout.requests.parts": "for a program that asks for a reply in parts, of several servers",
}
"""Modules and names that the product offers and does not use itself, and why."""
NOT_READ = {
    "engine.models.config.ModelConfig.bos_token_id": "checked when a config.json is read",
    "engine.protocol.commands.ReplicaState.held_pages": "a gauge of /metrics",
    "engine.protocol.commands.ReplicaState.num_sessions": "a gauge of /metrics",
    "engine.protocol.commands.ReplicaState.num_rollouts": "a gauge of /metrics",
    "engine.protocol.commands.MemoryReport.used_bytes": "for whoever asked to release memory",
    "engine.protocol.steps.EngineFacts.load_seconds": "for a benchmark's table",
    "engine.protocol.steps.EngineFacts.num_parameters": "for a benchmark's table",
    "rollout.masks.grammar.languages.gbnf.Repeated.part": "read by its place, in patterns",
    "rollout.client.Client.wait_ready": "for a program that started the server",
    "rollout.http.http_server.PatientServer.handle_exit": "for uvicorn, on a signal",
    "rollout.programs.runner.Runner.of_replica": "for a program",
    "rollout.programs.runner.Runner.of_server": "for a program",
    "rollout.programs.runner.Runner.run_batch": "for a program",
    "rollout.programs.state.State.assistant": "for a program",
    "rollout.programs.state.State.use_tools": "for a program",
    "rollout.programs.state.State.user": "for a program",
    "rollout.router.wire.client_connection.ClientConnection.on_url": "for httptools",
    "rollout.router.wire.client_connection.ClientConnection.pause_writing": "for its transport",
    "rollout.router.wire.client_connection.ClientConnection.resume_writing": "for its transport",
}
"""Members of public classes that the product does not read itself, and why."""


@pytest.fixture(scope="module")
def uses() -> Uses:
    return Uses()


@pytest.mark.slow
def test_every_public_name_is_used_by_the_product(uses: Uses) -> None:
    unused = {
        f"{module}.{name}" for module, name in uses.public() if not uses.in_product((module, name))
    }
    assert {
        name for name in unused if name.rpartition(".")[0] not in NOT_CALLED
    } <= NOT_CALLED.keys()


@pytest.mark.slow
def test_every_member_is_read_by_the_product(uses: Uses) -> None:
    product = [module for module in uses.modules.values() if module.package in PACKAGES]
    read = read_by_scripts().union(*(read_attributes(module) for module in product))
    unread = {
        f"{module}.{owner}.{member}"
        for module, owner, member in members(uses.modules)
        if member not in read and not owner.startswith("_")
    }
    assert unread <= NOT_READ.keys()


@pytest.mark.slow
def test_every_public_name_is_reached_by_a_test(uses: Uses) -> None:
    unreached = {f"{m}.{name}" for m, name in uses.public() if (m, name) not in uses.tested}
    assert unreached == set()
